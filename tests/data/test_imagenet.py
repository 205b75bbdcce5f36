"""ImageNet layout: class indices, class names and the flat validation folder."""

from pathlib import Path

import pytest

from lightspine.data import list_images, scan_imagenet
from lightspine.data.imagenet_classes import imagenet_synsets, synset_description
from lightspine.errors import UsageError
from support.images import write_image

# Three of the 1000 classes; class indices follow the order of the ids.
TENCH, BIRD, MACHINE = "n01440764", "n02012849", "n03126707"


def _train(root: Path) -> Path:
    for synset in (MACHINE, TENCH, BIRD):
        for i in range(2):
            write_image(root / "train" / synset / f"{synset}_{i}.JPEG", (9, 9, 9))
    return root


def _flat(root: Path, count: int = 3) -> list[str]:
    names = [f"ILSVRC2012_val_{i + 1:08d}" for i in range(count)]
    for name in names:
        write_image(root / "val" / f"{name}.JPEG", (9, 9, 9))
    return names


def test_classes_are_numbered_by_sorted_id_and_called_by_their_meaning(tmp_path: Path) -> None:
    write_image(_train(tmp_path) / "val" / MACHINE / "x.JPEG", (9, 9, 9))
    splits = scan_imagenet(tmp_path)
    assert splits.class_names == ["tench, Tinca tinca", f"crane ({BIRD})", f"crane ({MACHINE})"]
    assert [(s.path.parent.name, s.label) for s in splits.train[::2]] == [(TENCH, 0), (BIRD, 1), (MACHINE, 2)]
    assert [s.label for s in splits.val] == [2]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("val.txt", "{0}.JPEG 2\n{1}.JPEG 0\n{2}.JPEG 1\n"),
        ("val.txt", f"{{2}}.JPEG {BIRD}\n{{0}}.JPEG {MACHINE}\n{{1}}.JPEG {TENCH}\n"),
        (
            "LOC_val_solution.csv",
            f"ImageId,PredictionString\n{{2}},{BIRD} 1 2 3 4 \n{{0}},{MACHINE} 85 1 499 272 \n"
            f"{{1}},{TENCH} 0 0 9 9 \n",
        ),
        ("imagenet_2012_validation_synset_labels.txt", f"{MACHINE}\n{TENCH}\n{BIRD}\n"),
    ],
)
def test_flat_validation_folder_is_read_with_list(tmp_path: Path, name: str, content: str) -> None:
    names = _flat(_train(tmp_path))
    (tmp_path / name).write_text(content.format(*names))
    assert [(s.path.stem, s.label) for s in scan_imagenet(tmp_path).val] == list(
        zip(names, (2, 0, 1), strict=True)
    )


def test_list_may_lie_elsewhere(tmp_path: Path) -> None:
    names = _flat(_train(tmp_path / "data"), count=1)
    (tmp_path / "own.txt").write_text(f"{names[0]}.JPEG {BIRD}\n")
    splits = scan_imagenet(tmp_path / "data", val_list=tmp_path / "own.txt")
    assert [s.label for s in splits.val] == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("490\n361\n171\n", "WordNet id per line .* development kit"),
        (f"{TENCH}\n{BIRD}\n", "expected 3 lines, one per image, .* got 2"),
        ("ILSVRC2012_val_00000001.JPEG 0\n", r"ILSVRC2012_val_00000002\.JPEG of .* is not in the list"),
        ("ILSVRC2012_val_00000001.JPEG 3\n", "class 3 in .* not among the 3 classes"),
    ],
)
def test_wrong_list_is_refused(tmp_path: Path, content: str, message: str) -> None:
    _flat(_train(tmp_path))
    (tmp_path / "val.txt").write_text(content)
    with pytest.raises(UsageError, match=message):
        scan_imagenet(tmp_path)


def test_flat_folder_without_list_tells_what_to_give(tmp_path: Path) -> None:
    _flat(_train(tmp_path))
    with pytest.raises(UsageError, match=r"not in class folders: pass a list of their classes as val_list"):
        scan_imagenet(tmp_path)


def test_missing_validation_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"folders train and val in .*, but val is missing"):
        scan_imagenet(_train(tmp_path))


def test_folder_that_is_no_synset_is_named(tmp_path: Path) -> None:
    _flat(_train(tmp_path))
    write_image(tmp_path / "train" / "cats" / "x.JPEG", (9, 9, 9))
    with pytest.raises(UsageError, match=r"named by WordNet ids.* got cats"):
        scan_imagenet(tmp_path)


def test_checkpoint_that_knows_meanings_finds_folders_called_by_ids(tmp_path: Path) -> None:
    names = ["tench, Tinca tinca", f"crane ({BIRD})", f"crane ({MACHINE})"]
    samples = list_images(_train(tmp_path) / "train", names[::-1])[1]
    assert {(s.path.parent.name, s.label) for s in samples} == {(TENCH, 2), (BIRD, 1), (MACHINE, 0)}


def test_thousand_classes_have_different_names() -> None:
    synsets = imagenet_synsets()
    assert synsets == sorted(synsets)
    assert len({synset_description(synset) for synset in synsets}) == 1000
