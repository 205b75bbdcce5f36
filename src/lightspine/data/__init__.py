"""Images from disk and from scikit-learn. `data.modules` adds Lightning, which is slow to import."""

from lightspine.data.augmentation import AUGMENTATIONS, Augmentation, AugmentationName
from lightspine.data.bad_images import BadImageCounter
from lightspine.data.batch import BadImage, Batch, Item, collate_images
from lightspine.data.class_mapping import ClassMapping, load_class_mapping
from lightspine.data.dataset import ImageDataset, ImageSource
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
from lightspine.data.images import MIN_SIDE, decode_image, open_image
from lightspine.data.seeding import SeededDataset
from lightspine.data.shards import ShardSource, expand_shards
from lightspine.data.transforms import (
    Preprocessing,
    create_eval_transform,
    create_train_transform,
)

__all__ = [
    "AUGMENTATIONS",
    "MIN_SIDE",
    "Augmentation",
    "AugmentationName",
    "BadImage",
    "BadImageCounter",
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
