"""Write docs/drawings/*.svg, or the same into another folder: `python docs/_drawings [FOLDER]`."""

import sys
from pathlib import Path

import families
import scans
from svg import save

DRAWINGS = {
    "recurrence": scans.recurrence,
    "directions": scans.directions,
    "middle_token": scans.middle_token,
    "vmamba": families.vmamba,
    "vim": families.vim,
    "efficientvim": families.efficientvim,
    "shvit": families.shvit,
    "efficientmod": families.efficientmod,
}

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1] / "drawings"
    folder.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        save(draw(), folder / f"{name}.svg")
