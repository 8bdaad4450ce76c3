"""``fedmmkt predict``: tables of predictions, from images, folders and tables."""

import csv
import io
from pathlib import Path

import datasets
import pytest

from fedmmkt.deploy.predict import main
from tests.client_app.test_trained import CLASSES, pictures, saved


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture
def images(tmp_path):
    """Write five images to a folder, the last in a folder below."""
    (tmp_path / "new" / "more").mkdir(parents=True)
    paths = [tmp_path / "new" / name for name in ("2.png", "10.jpg", "11.bmp", "1.webp", "more/3.png")]
    for path, picture in zip(paths, pictures(), strict=True):
        picture.save(path)
    return paths


def test_images_and_folders_become_rows_in_natural_order(tmp_path, images, capsys):
    folder, _ = saved(tmp_path)

    code = main([str(folder), str(images[1]), str(tmp_path / "new"), "--all-classes"])

    shown = rows(capsys.readouterr().out)
    names = ["new/10.jpg", "new/1.webp", "new/2.png", "new/10.jpg", "new/11.bmp", "new/more/3.png"]
    assert code == 0
    assert [row["file"] for row in shown] == [str(tmp_path / name) for name in names]
    assert list(shown[0]) == ["file", "class", "probability", *(f"p({name})" for name in CLASSES)]
    for row in shown:
        each = {name: float(row[f"p({name})"]) for name in CLASSES}
        assert float(row["probability"]) == max(each.values()) == each[row["class"]]
        assert sum(each.values()) == pytest.approx(1, abs=2e-4)


def test_a_file_that_does_not_decode_is_named_and_left_out(tmp_path, images, capsys):
    folder, _ = saved(tmp_path)
    (tmp_path / "new" / "5.png").write_text("no image")

    code = main([str(folder), str(tmp_path / "new"), "--out", str(tmp_path / "out" / "table.csv")])

    shown = capsys.readouterr()
    assert code == 1
    assert shown.err == f"left out: {tmp_path / 'new' / '5.png'}: its image does not decode: it is of no known format\n"
    assert len(rows((tmp_path / "out" / "table.csv").read_text())) == 5
    assert not shown.out


def test_a_text_client_reads_the_text_column_of_tables(tmp_path, capsys):
    folder, _ = saved(tmp_path, "text", text_column="note")
    (tmp_path / "notes.csv").write_text("note,id\na disc,1\n,2\na ring on a table,3\n")
    datasets.Dataset.from_dict({"report": ["a square"]}).to_parquet(tmp_path / "more.parquet")

    code = main([str(folder), str(tmp_path / "notes.csv")])
    other = main([str(folder), str(tmp_path / "more.parquet"), "--text-column", "report"])

    shown = capsys.readouterr()
    assert (code, other) == (1, 0)
    places = [(Path(row["file"]).name, row["row"]) for row in rows(shown.out) if row["file"] != "file"]
    assert places == [("notes.csv", "0"), ("notes.csv", "2"), ("more.parquet", "0")]
    assert shown.err == f"left out: {tmp_path / 'notes.csv'}, row 1: it has no text\n"


def test_a_client_of_pairs_reads_both_columns(tmp_path, images, capsys):
    folder, _ = saved(tmp_path, "dual", image_column="photo")
    (tmp_path / "new" / "pairs.csv").write_text("photo,text\n2.png,a disc\nlost.png,a ring\nmore/3.png,a ring\n")

    code = main([str(folder), str(tmp_path / "new" / "pairs.csv")])

    shown = capsys.readouterr()
    assert code == 1
    assert [row["row"] for row in rows(shown.out)] == ["0", "2"]
    assert f"pairs.csv, row 1 (lost.png): its image '{tmp_path / 'new' / 'lost.png'}' is not there" in shown.err
    assert "lost.png' is not there" in shown.err


def test_rows_of_tables_are_told_apart_by_their_photo_and_their_id(tmp_path, images, capsys):
    folder, _ = saved(tmp_path, image_column="photo")
    (tmp_path / "new" / "t.csv").write_text("photo,case\n2.png,A7\nlost.png,A8\nmore/3.png,\n")
    embedded = {"photo": [{"bytes": images[0].read_bytes(), "path": "2.png"}], "case": [9]}
    datasets.Dataset.from_dict(embedded).cast_column("photo", datasets.Image()).to_parquet(tmp_path / "e.parquet")

    code = main([str(folder), str(tmp_path / "new" / "t.csv"), str(tmp_path / "e.parquet"), "--id-column", "case"])
    shown = capsys.readouterr()
    plain = main([str(folder), str(tmp_path / "e.parquet"), str(images[1])])
    other = rows(capsys.readouterr().out)
    unknown = main([str(folder), str(tmp_path / "e.parquet"), "--id-column", "nr"])

    assert (code, plain, unknown) == (1, 0, 2)
    assert list(rows(shown.out)[0]) == ["file", "row", "image", "case", "class", "probability"]
    told = [(row["row"], row["image"], row["case"]) for row in rows(shown.out)]
    assert told == [("0", "2.png", "A7"), ("2", "more/3.png", ""), ("0", "2.png", "9")]
    assert "t.csv, row 1 (A8): its image" in shown.err
    assert [(row["row"], row["image"]) for row in other] == [("0", "2.png"), ("", "")]
    assert "has no id column 'nr'; allowed: --id-column with one of photo, case" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "file", "named"),
    [
        ("mlp", "gone.png", "gone.png is not there; allowed: images, folders of images, and tables"),
        ("mlp", "table.csv", r"table.csv has no image column 'image'; allowed: --image-column with one of note"),
        ("mlp", "", "holds no images; allowed: images, folders of images"),
        ("text", "picture.png", "picture.png is no table, and the model reads texts; allowed: tables"),
    ],
)
def test_what_cannot_be_predicted_at_all_is_refused(tmp_path, capsys, model, file, named):
    folder, _ = saved(tmp_path, model)
    place = tmp_path / "data"
    place.mkdir()
    if file == "picture.png":
        pictures(1)[0].save(place / file)
    if file == "table.csv":
        (place / file).write_text("note\na\n")

    code = main([str(folder), str(place / file), "--out", str(tmp_path / "out.csv")])

    assert code == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_a_wrong_column_leaves_no_half_table(tmp_path, images, capsys):
    folder, _ = saved(tmp_path)
    (tmp_path / "t.csv").write_text("photo\nnew/2.png\n")

    code = main([str(folder), str(tmp_path / "t.csv"), "--image-column", "picture"])

    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    assert "has no image column 'picture'; allowed: --image-column with one of photo" in shown.err


def test_without_files_a_run_names_its_clients(tmp_path, capsys):
    folder, _ = saved(tmp_path)

    run = main([str(folder.parent.parent)])
    of_run = capsys.readouterr().err
    client = main([str(folder)])

    assert (run, client) == (2, 2)
    assert f"allowed: a client's folder, here {folder}" in of_run
    assert "no FILE is given; allowed: images, folders of images, or tables" in capsys.readouterr().err
