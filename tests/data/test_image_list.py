"""CSV and TSV image lists: columns, classes, splits and errors."""

from pathlib import Path

import pytest

from lightspine.data import read_image_list, split_image_list
from lightspine.data.class_names import encode_labels, infer_class_names, read_class_names
from lightspine.errors import LightspineError, UsageError
from support.images import write_image


def _list(tmp_path: Path, *lines: str, name: str = "list.csv") -> Path:
    for image in ("a.jpg", "b.jpg", "sub/c.jpg", "d, e.jpg"):
        write_image(tmp_path / image, (9, 9, 9))
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return path


def test_list_without_head_has_path_and_label(tmp_path: Path) -> None:
    images = read_image_list(_list(tmp_path, "a.jpg,cat", '"d, e.jpg",dog'))
    assert [(i.path, i.label, i.split) for i in images] == [
        (tmp_path / "a.jpg", "cat", None),
        (tmp_path / "d, e.jpg", "dog", None),
    ]


def test_list_with_head_has_columns_in_any_order(tmp_path: Path) -> None:
    (image,) = read_image_list(_list(tmp_path, "Label,author,Path,split", "cat,me,sub/c.jpg,test"))
    assert (image.path, image.label, image.split) == (tmp_path / "sub" / "c.jpg", "cat", "test")


def test_tsv_has_tabs(tmp_path: Path) -> None:
    (image,) = read_image_list(_list(tmp_path, "d, e.jpg\tcat", name="list.tsv"))
    assert image.path == tmp_path / "d, e.jpg"


def test_root_stands_before_relative_paths(tmp_path: Path) -> None:
    path = _list(tmp_path, "c.jpg,cat")
    assert read_image_list(path, root=tmp_path / "sub")[0].path == tmp_path / "sub" / "c.jpg"


def test_split_column_divides_the_list(tmp_path: Path) -> None:
    splits = split_image_list(_list(tmp_path, "a.jpg,cat,train", "b.jpg,dog,train", "sub/c.jpg,dog,test"))
    assert splits.class_names == ["cat", "dog"]
    assert [s.label for s in splits.train] == [0, 1]
    assert [(s.path.name, s.label) for s in splits.val] == [("c.jpg", 1)]


def test_val_split_chooses_among_several(tmp_path: Path) -> None:
    path = _list(tmp_path, "a.jpg,cat,train", "b.jpg,dog,train", "sub/c.jpg,dog,test", "b.jpg,cat,val")
    assert [s.path.name for s in split_image_list(path).val] == ["b.jpg"]
    assert [s.path.name for s in split_image_list(path, val_split="test").val] == ["c.jpg"]


def test_list_without_splits_holds_out_a_share(tmp_path: Path) -> None:
    splits = split_image_list(
        _list(tmp_path, "a.jpg,x", "b.jpg,x", "sub/c.jpg,y", "a.jpg,y"), val_fraction=0.5
    )
    assert sorted(s.label for s in splits.train) == sorted(s.label for s in splits.val) == [0, 1]


def test_class_names_file_gives_the_order(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("zebra\ncat\n")
    path = _list(tmp_path, "a.jpg,cat,train", "b.jpg,0,train", "sub/c.jpg,zebra,val")
    splits = split_image_list(path, class_names=tmp_path / "classes.txt")
    assert splits.class_names == ["zebra", "cat"]
    assert [s.label for s in splits.train + splits.val] == [1, 0, 0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a.jpg,cat,train", "b.jpg,dog,train"], "split val in .* which has train"),
        (["a.jpg,cat,val", "b.jpg,dog,val"], "split train in .* which has val"),
        (
            ["a.jpg,cat,train", "b.jpg,dog"],
            r"columns path, label, split in line 2 of .* got \['b.jpg', 'dog'\]",
        ),
        (["path,label,label", "a.jpg,cat,dog"], "columns path, label, label in line 2"),
        (["a.jpg"], "columns path, label in line 1"),
        (["a.jpg,"], "a path and a label in line 1"),
        (["path,label"], "at least one image"),
        ([""], "at least one image"),
        (["a.jpg,cat", "b.jpg,cat"], "at least two classes .* found 1"),
        (["gone.jpg,cat", "gone2.jpg,dog"], r"none of the first images .* such as .*gone\.jpg"),
    ],
)
def test_wrong_list_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        split_image_list(_list(tmp_path, *lines))


def test_asked_split_is_missed_in_a_list_without_splits(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"split test in .* has no split column"):
        split_image_list(_list(tmp_path, "a.jpg,cat", "b.jpg,dog"), val_split="test")


def test_list_of_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.csv or \.tsv"):
        read_image_list(_list(tmp_path, "a.jpg cat", name="list.txt"))


def test_list_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LightspineError, match=r"cannot read the list .*list\.csv"):
        read_image_list(tmp_path / "list.csv")


def test_whole_numbers_are_class_numbers() -> None:
    names = infer_class_names(["2", "10", "2"])
    assert len(names) == 11
    assert encode_labels(["10", "2"], names, "x").tolist() == [10, 2]


def test_name_goes_before_number() -> None:
    assert encode_labels(["7", "3", "0"], ["7", "3"], "x").tolist() == [0, 1, 0]


def test_unknown_label_is_named() -> None:
    with pytest.raises(UsageError, match="label 'owl' of x is not among the 2 classes"):
        encode_labels(["cat", "owl"], ["cat", "dog"], "x")


def test_class_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(UsageError, match="'cat' appears twice"):
        read_class_names(tmp_path / "classes.txt")
