"""Convert VOC, YOLO, LabelMe and mask datasets to the layouts that the data modules read."""

from lightspine.data.convert.labelme import convert_labelme
from lightspine.data.convert.masks import convert_masks
from lightspine.data.convert.output import Conversion
from lightspine.data.convert.voc import convert_voc
from lightspine.data.convert.yolo import convert_yolo

__all__ = ["Conversion", "convert_labelme", "convert_masks", "convert_voc", "convert_yolo"]
