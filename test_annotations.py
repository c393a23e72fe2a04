"""Lists of annotated clips, read and checked."""
import json

import pytest

from annotations import read_list
from clips import ANNOTATIONS
from files import InputError


def test_the_three_kinds_of_list_give_the_same_entries(tmp_path):
    clips = [{"source_id": "one", "video_path": "v/a.mp4", "short_caption": "s", "long_caption": "l",
              "physics_quality": "good", "human_quality": 0, "blur_quality": None, "pair_id": 0},
             {"video": "/far/b.mp4", "prompt": "p, q", "text_alignment": 1}]
    (tmp_path / "a.json").write_text(json.dumps(clips))
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(clip) for clip in clips))
    (tmp_path / "a.csv").write_text("\ufeffvideo,source_id,short_caption,long_caption,prompt,physics_quality,"
                                    "human_quality,text_alignment,pair_id\nv/a.mp4,one,s,l,,good,poor,,0\n"
                                    '/far/b.mp4,,,,"p, q",,,1.0,\n', encoding="utf-8")
    none = dict.fromkeys(ANNOTATIONS)
    expected = [{"source_id": "one", "video_path": str(tmp_path / "v/a.mp4"), "short_caption": "s",
                 "long_caption": "l", "labels": none | {"physics_quality": 1, "human_quality": 0},
                 "pair_id": "0"},
                {"source_id": "b", "video_path": "/far/b.mp4", "short_caption": "p, q",
                 "long_caption": "p, q", "labels": none | {"text_alignment": 1}, "pair_id": None}]
    for name, lines in [("a.json", (1, 2)), ("a.jsonl", (1, 3)), ("a.csv", (2, 3))]:
        numbered = [{"line": line} | entry for line, entry in zip(lines, expected, strict=True)]
        assert read_list(tmp_path / name) == numbered


def test_captions_stand_in_for_each_other(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"video": "a", "long_caption": "l", "short_caption": " "},
                                                 {"video": "b", "short_caption": "s", "long_caption": None}]))
    found = [(entry["short_caption"], entry["long_caption"]) for entry in read_list(tmp_path / "a.json")]
    assert found == [("l", "l"), ("s", "s")]


@pytest.mark.parametrize("name, content, message", [
    ("a.json", b"[{]", "a.json is not valid JSON"),
    ("a.json", b'{"video": "a.mp4"}', "a.json is not a list of clips"),
    ("a.json", b'["a.mp4"]', "give each an object"),
    ("a.jsonl", b'{}\n{"video"\n', "a.jsonl, line 2 is not valid JSON"),
    ("a.csv", b"video,prompt\n", "a.csv is not a list of clips"),
    ("a.csv", b"\xff\xfe", "a.csv is not UTF-8"),
    ("a.csv", None, "a.csv does not exist"),
    ("a.txt", b"", "a.txt is not an annotation list; give a .json, .jsonl or .csv")])
def test_a_list_that_cannot_be_read_is_reported(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_list(tmp_path / name)
