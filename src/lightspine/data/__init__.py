"""Data sets, transforms and loaders; `lightspine.data.modules` is separate because it imports Lightning."""

from lightspine.data.bad_images import BadImage, BadImageLog
from lightspine.data.class_mapping import ClassMapping, load_class_mapping
from lightspine.data.dataset import Batch, ImageDataset, ImageSource, Item, collate_images
from lightspine.data.digits import DigitsDataset, export_digits
from lightspine.data.hugging_face import HuggingFaceSource, load_hugging_face
from lightspine.data.image_folder import (
    FileSource,
    FolderSplits,
    ImageFolderDataset,
    Sample,
    list_images,
    scan_image_folder,
)
from lightspine.data.image_list import read_image_list, split_image_list
from lightspine.data.imagenet import imagenet_class_mapping, list_imagenet_val, scan_imagenet
from lightspine.data.loader import SeededDataset
from lightspine.data.shards import ShardSource, expand_shards
from lightspine.data.transforms import (
    AUGMENTATIONS,
    Augmentation,
    AugmentationName,
    Preprocessing,
    create_eval_transform,
    create_train_transform,
)
from lightspine.utils.image_files import MIN_SIDE, decode_image, open_image

__all__ = [
    "AUGMENTATIONS",
    "MIN_SIDE",
    "Augmentation",
    "AugmentationName",
    "BadImage",
    "BadImageLog",
    "Batch",
    "ClassMapping",
    "DigitsDataset",
    "FileSource",
    "FolderSplits",
    "HuggingFaceSource",
    "ImageDataset",
    "ImageFolderDataset",
    "ImageSource",
    "Item",
    "Preprocessing",
    "Sample",
    "SeededDataset",
    "ShardSource",
    "collate_images",
    "create_eval_transform",
    "create_train_transform",
    "decode_image",
    "expand_shards",
    "export_digits",
    "imagenet_class_mapping",
    "list_imagenet_val",
    "list_images",
    "load_class_mapping",
    "load_hugging_face",
    "open_image",
    "read_image_list",
    "scan_image_folder",
    "scan_imagenet",
    "split_image_list",
]
