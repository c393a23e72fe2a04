"""Lists of annotated clips, read and checked."""
import difflib
import json

import pytest

from annotations import label_meant, list_faults, read_list
from clips import ANNOTATIONS
from files import InputError


def faults_of(tmp_path, *clips):
    """The sentences about each clip of a .json list. What a clip does not give is in order."""
    clips = [{"video": f"{n}.mp4", "prompt": "p"} | clip for n, clip in enumerate(clips)]
    (tmp_path / "a.json").write_text(json.dumps(clips))
    return list_faults(read_list(tmp_path / "a.json"))


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
                 "pair_id": "0", "faults": []},
                {"source_id": "b", "video_path": "/far/b.mp4", "short_caption": "p, q",
                 "long_caption": "p, q", "labels": none | {"text_alignment": 1}, "pair_id": None,
                 "faults": []}]
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
    ("a.json", b"", "a.json is not valid JSON"),
    ("a.json", b"[]", "a.json is not a list of clips"),
    ("a.json", b"[" * 100_000, "a.json is not valid JSON"),
    ("a.json", bytes(range(256)), "a.json is not UTF-8"),
    ("a.json", b'[{"video": "a.mp4"}, [1]]', r"a.json is not a list of clips \(line 2\)"),
    ("a.json", b'{"video": "a.mp4"}', "a.json is not a list of clips"),
    ("a.json", b'["a.mp4"]', "give each an object"),
    ("a.jsonl", b'{}\n{"video"\n', "a.jsonl, line 2 is not valid JSON"),
    ("a.jsonl", b'{}\n\n"a.mp4"\n', r"a.jsonl is not a list of clips \(line 3\)"),
    ("a.jsonl", b"", "a.jsonl is not a list of clips"),
    ("a.csv", b"", "the header names no video"),
    ("a.csv", b"video,prompt\n", "a.csv is not a list of clips"),
    ("a.csv", b"\xff\xfe", "a.csv is not UTF-8"),
    ("a.csv", None, "a.csv does not exist"),
    ("a.txt", b"", "a.txt is not an annotation list; give a .json, .jsonl or .csv")])
def test_a_list_that_cannot_be_read_is_reported(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_list(tmp_path / name)


def test_a_list_that_is_not_a_file_is_reported(tmp_path):
    for suffix in ("json", "jsonl", "csv"):
        (tmp_path / f"a.{suffix}").mkdir()
        (tmp_path / f"b.{suffix}").symlink_to("nowhere")
        with pytest.raises(InputError, match=f"a.{suffix} is not a file"):
            read_list(tmp_path / f"a.{suffix}")
        with pytest.raises(InputError, match=f"b.{suffix} does not exist"):
            read_list(tmp_path / f"b.{suffix}")


# ------------------------------------------------------------------------------ CSV

@pytest.mark.parametrize("rows, sentences", [
    (["video,prompt,seed", "a.mp4,a red, disc,1", "b.mp4,fine,2"],
     ["line 2 has 4 fields, and the header has 3; put fields that contain commas in quotes"]),
    (["video,prompt", "a.mp4"], ["line 2 has 1 fields"]),
    # An open quote swallows nothing, whatever the lines after it look like.
    (["video,prompt", 'a.mp4,"open', "b.mp4,fine"], ["line 2 cannot be split"]),
    (["video,prompt", 'a.mp4,"open', 'b.mp4,"closed"', "", 'c.mp4,"x" y'],
     ["line 2 cannot be split", "line 5 cannot be split"]),
    (["video,prompt", 'a.mp4,"two', 'lines"'], ["line 2 cannot be split", "line 3 has 1 fields"]),
    (["video,prompt,prompt", "a.mp4,p,q"], ["the header names prompt twice"]),
    (["video;prompt", "a.mp4;p"], ["video,prompt with commas, not semicolons or tabs"]),
    (["video\tprompt", "a.mp4\tp"], ["the header names no video"]),
    (["a.mp4,p", "b.mp4,p"], ["the header names no video"]),
    (["video,prompt", f"a.mp4,{200_000 * 'x'}"], ["line 2 cannot be split"])])
def test_a_csv_that_would_lose_something_is_refused(tmp_path, rows, sentences):
    (tmp_path / "a.csv").write_text("\n".join(rows))
    with pytest.raises(InputError) as error:
        read_list(tmp_path / "a.csv")
    first, *found = str(error.value).splitlines()
    assert first.endswith("a.csv cannot be read as a table:")
    for sentence, line in zip(sentences, found, strict=True):
        assert sentence in line


def test_a_csv_as_spreadsheets_write_it(tmp_path):
    text = '\ufeffvideo, prompt,,\r\n\r\na.mp4, "one, ""two""",,\r\nb.mp4,12" disc,,3\r\n'
    (tmp_path / "a.csv").write_bytes(text.encode())
    entries = read_list(tmp_path / "a.csv")
    found = [(entry["line"], entry["short_caption"]) for entry in entries]
    assert found == [(3, 'one, "two"'), (4, '12" disc')]
    assert list_faults(entries) == [[], []]


# ------------------------------------------------------------------------------ labels

@pytest.mark.parametrize("value, meaning", [
    (1, 1), (1.0, 1), (True, 1), ("1", 1), (" 1 ", 1), ("1.0", 1), ("Good", 1), ("true", 1),
    (0, 0), (0.0, 0), (False, 0), ("0", 0), ("poor", 0), ("False", 0),
    (None, None), ("", None), (" ", None), ("null", None), ("None", None)])
def test_what_a_label_may_be(tmp_path, value, meaning):
    assert faults_of(tmp_path, {"blur_quality": value}, {"labels": {"blur_quality": value}}) == [[], []]
    for entry in read_list(tmp_path / "a.json"):
        assert entry["labels"]["blur_quality"] is meaning


@pytest.mark.parametrize("value", [
    2, -1, 0.5, float("nan"), float("inf"), "yes", "maybe", "nan", "good?", [], [1], {}, {"value": 1}])
def test_what_a_label_may_not_be(tmp_path, value):
    for sentences in faults_of(tmp_path, {"blur_quality": value}, {"labels": {"blur_quality": value}}):
        assert len(sentences) == 1
        assert f"blur_quality is {value!r}; write 1 or good, 0 or poor, or null" in sentences[0]


@pytest.mark.parametrize("clip, sentence", [
    ({"labels": "good"}, "\"labels\" is 'good'; name each label"),
    ({"labels": [1, 0]}, '"labels" is [1, 0]'), ({"labels": 0}, '"labels" is 0'),
    ({"labels": False}, '"labels" is False'),
    ({"motion_quality": 1}, "motion_quality is physics_quality AND human_quality; label these two"),
    ({"labels": {"Motion quality": 0}}, "motion_quality is physics_quality AND human_quality"),
    ({"fysics_quality": 1}, "'fysics_quality' is not a label; write physics_quality"),
    ({"labels": {"blurr_quality": 0}}, "'blurr_quality' is not a label; write blur_quality"),
    ({"Human Quality": 0}, "'Human Quality' is not a label; write human_quality"),
    ({"blur_quality": 1, "labels": {"blur_quality": 0}}, 'blur_quality is 1 beside "labels" and 0 in it')])
def test_no_label_is_lost(tmp_path, clip, sentence):
    (found,) = faults_of(tmp_path, clip)
    assert len(found) == 1 and sentence in found[0]


def test_columns_of_others_are_left_alone(tmp_path):
    foreign = ["video_quality", "alignment", "quality", "image_quality", "prompt_alignment", "motion", "seed"]
    clip = dict.fromkeys(foreign, 1) | {"blur_quality": 1}
    clip |= {"motion_quality": None, "fysics_quality": None}  # nothing is lost with these
    assert faults_of(tmp_path, clip, {"labels": clip}) == [[], []]
    assert [label_meant(name) for name in foreign] == [None] * len(foreign)
    assert read_list(tmp_path / "a.json")[0]["labels"] == dict.fromkeys(ANNOTATIONS) | {"blur_quality": 1}


def test_a_label_counts_that_is_only_beside_the_others(tmp_path):
    clip = {"physics_quality": 0, "human_quality": 1,
            "labels": {"physics_quality": None, "human_quality": "good", "blur_quality": 1}}
    assert faults_of(tmp_path, clip) == [[]]
    assert list(read_list(tmp_path / "a.json")[0]["labels"].values()) == [0, 1, None, 1]


# ------------------------------------------------------------------------------ text

@pytest.mark.parametrize("name", [
    "..", ".", "a/b", "/a", "a\\b", "a\nb", "a\rb", "a\tb", "a\x1bb", "a\x85b", "a\u2028b",
    201 * "x"])
def test_a_source_id_names_a_file_on_any_system(tmp_path, name):
    (found,) = faults_of(tmp_path, {"source_id": name})
    assert len(found) == 1 and "source_id cannot name a file" in found[0] and found[0].isprintable()


def test_two_source_ids_that_differ_in_capitals_are_one_file(tmp_path):
    first, second, third = faults_of(
        tmp_path, {"source_id": "Ball"}, {"source_id": "ball 2"}, {"video": "bALL.mp4"})
    assert first == second == []
    (sentence,) = third
    assert sentence.startswith("line 3 (bALL): line 1 has the same source_id (capitals do not count);")
    assert faults_of(tmp_path, {"source_id": "红　球"}, {"source_id": 7}) == [[], []]


@pytest.mark.parametrize("value", [["a"], {"a": "b"}, True, float("nan"), "half \ud800", "a\x00b"])
@pytest.mark.parametrize("name", ["video_path", "source_id", "short_caption", "prompt", "pair_id"])
def test_text_is_text(tmp_path, name, value):
    (found,) = faults_of(tmp_path, {name: value})
    assert f"{name} is {value!r}; write text" in found[0]
    "\n".join(found).encode()  # it can be printed


def test_a_long_list_looks_each_key_up_once(tmp_path, monkeypatch):
    """100,000 clips take seconds; it was half a minute when each clip's keys were looked up again."""
    looked_up = []
    real = difflib.get_close_matches
    monkeypatch.setattr(difflib, "get_close_matches", lambda *given: looked_up.append(given) or real(*given))
    label_meant.cache_clear()
    assert not any(faults_of(tmp_path, *[{"blur_quality": n % 2, "seed": n} for n in range(1000)]))
    assert len(looked_up) == 3  # video, prompt, seed
