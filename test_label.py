"""The labelling page: what it serves and refuses, and what the list holds after every key."""
import http.client
import json
import re
import socket
import threading
import time
from contextlib import contextmanager

import pytest

import label
from annotations import read_list
from clips import LABELS
from files import InputError

MOTION = ("physics_quality", "human_quality")


def clip(name, **more):
    return {"source_id": name, "video_path": f"{name}.mp4", "short_caption": f"about {name}", **more}


@pytest.fixture
def path(tmp_path):
    """A list of six clips. Their videos are any bytes: only a browser looks into them, the page does not."""
    for name in "abcdef":
        (tmp_path / f"{name}.mp4").write_bytes(name.encode() * 100 + bytes(range(100)))
    entries = [clip(name, seed=i, note=["é", None, 1.5]) for i, name in enumerate("abcdef")]
    (tmp_path / "clips.json").write_text(json.dumps(entries))
    return tmp_path / "clips.json"


class Browser:
    """One address, and the clips by the names that the page does not know."""

    def __init__(self, server):
        self.server = server
        self.number = {server.entries[i]["source_id"]: number for number, i in enumerate(server.order)}

    def __call__(self, path, method="GET", body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        answer.body = answer.read()
        connection.close()
        return answer

    def post(self, body, kind="application/json"):
        return self("/label", "POST", body, Content_Type=kind).status

    def label(self, name, value):
        return self.post(json.dumps({"clip": self.number[name], "label": value}))

    def clips(self):
        return json.loads(self("/clips").body)["clips"]


@contextmanager
def served(path, name="motion_quality"):
    with label.Server(path, name, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Browser(server)
        finally:
            server.shutdown()
            thread.join()


def on_disk(path):
    return {entry["source_id"]: entry for entry in json.loads(path.read_text())}


def motion(path, name):
    return [on_disk(path)[name].get(part) for part in MOTION]


# ------------------------------------------------------------------------------ the page

def test_the_page_and_the_clips_tell_no_names(path):
    with served(path) as browser:
        page = browser("/")
        assert page.status == 200 and page.getheader("Content-Type").startswith("text/html")
        assert b"<video" in page.body
        assert sorted(found["caption"] for found in browser.clips()) == [f"about {name}" for name in "abcdef"]
        assert all(set(found) == {"caption", "label"} for found in browser.clips())
        assert json.loads(browser("/clips").body)["label"] == "motion_quality"
        assert browser.server.server_address[0] == "127.0.0.1"


def test_the_order_is_shuffled_and_always_the_same(path):
    with served(path) as first, served(path, "blur_quality") as second:
        assert first.server.order == second.server.order != sorted(first.server.order)
        assert sorted(first.server.order) == list(range(6))


def test_videos_whole_and_in_parts(path):
    with served(path) as browser:
        for name, number in browser.number.items():
            content = path.with_name(f"{name}.mp4").read_bytes()
            whole = browser(f"/video/{number}")
            assert (whole.status, whole.body, whole.getheader("Content-Type")) == (200, content, "video/mp4")
            assert whole.getheader("Accept-Ranges") == "bytes"
            assert whole.getheader("Cache-Control") == "no-store"
        ranges = [("0-1", 0, 1), ("100-", 100, 199), ("150-160", 150, 160), ("190-900", 190, 199)]
        for asked, first, last in ranges:
            part = browser(f"/video/{number}", Range=f"bytes={asked}")
            assert (part.status, part.body) == (206, content[first:last + 1])
            assert part.getheader("Content-Range") == f"bytes {first}-{last}/200"
            assert part.getheader("Content-Length") == str(last + 1 - first)
        for asked in ("bytes=900-", "bytes=5-3", "bytes=-5", "bytes=", "bytes=0-1,5-6", "lines=0-1",
                      "bytes=" + 5000 * "9" + "-"):
            assert browser(f"/video/{number}", Range=asked).body == content


def test_nothing_else_is_served(path):
    (path.parent / "secret.mp4").write_bytes(b"secret")
    with served(path) as browser:
        for asked in ("/clips.json", "/../secret.mp4", "//etc/passwd", str(path), "/?x",
                      "/video/", "/video/6", "/video/-1", "/video/a.mp4",
                      "/video/0/../secret.mp4", "/video/..%2fsecret.mp4", "/video/" + 5000 * "1"):
            assert browser(asked).status == 404, asked


def test_only_its_own_address_is_answered(path):
    """A name of another site may lead to 127.0.0.1 too (DNS rebinding)."""
    before, body = path.read_text(), '{"clip": 0, "label": 1}'
    with served(path) as browser:
        port = browser.server.server_port
        for host in ("127.0.0.1", "localhost", "[::1]"):
            assert browser("/", Host=f"{host}:{port}").status == 200
        for host in ("evil.com", f"a.com:{port}", "127.0.0.1", "localhost:1", f"127.0.0.1.a.com:{port}", ""):
            for asked in ("/", "/clips", "/video/0", "/no"):
                answer = browser(asked, Host=host)
                assert (answer.status, answer.body) == (403, f"open http://127.0.0.1:{port} instead".encode())
            assert browser("/label", "POST", body, Host=host, Content_Type="application/json").status == 403
        assert path.read_text() == before


def test_idle_connections_are_few_and_short(path, monkeypatch):
    monkeypatch.setattr(label, "CONNECTIONS", 2)
    monkeypatch.setattr(label.Handler, "timeout", 600)
    with served(path) as browser:
        address = ("127.0.0.1", browser.server.server_port)
        idle = [socket.create_connection(address, timeout=60) for _ in range(2)]
        third = socket.create_connection(address, timeout=20)  # the server takes them in this order
        assert third.recv(1) == b""  # closed at once
        for connection in (*idle, third):
            connection.close()
        for _ in range(6000):  # until the server has noticed
            if browser.server.places._value < 2:
                time.sleep(0.01)
        assert browser("/").status == 200

        monkeypatch.setattr(label.Handler, "timeout", 0.1)
        with socket.create_connection(address, timeout=60) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\nHost")
            assert slow.recv(1) == b""


@pytest.mark.parametrize("name", LABELS)
def test_the_page_says_what_good_and_poor_mean(path, name):
    with served(path, name) as browser:
        about = json.loads(browser("/clips").body)
        assert (about["good"], about["poor"]) == label.MEANING[name]
        assert about["list"] == str(path)  # for the command on the last screen
        page = browser("/").body.decode()
        assert 'id="good"' in page and 'id="poor"' in page and "data.py --list ${about.list}" in page
        assert not re.search("https?:|src=|@import", page)  # nothing from outside


def test_a_video_that_goes_away(path):
    with served(path) as browser:
        path.with_name("a.mp4").unlink()
        assert browser(f"/video/{browser.number['a']}").status == 404
        assert browser("/").status == 200


# ------------------------------------------------------------------------------ labels

def test_every_key_is_on_the_disk_and_all_else_stays(path):
    before = on_disk(path)
    with served(path, "blur_quality") as browser:
        for name, value in [("c", 1), ("a", 0), ("f", 1), ("a", 1), ("f", None)]:
            assert browser.label(name, value) == 200
            before[name]["blur_quality"] = value
            assert on_disk(path) == before and list(on_disk(path)) == list("abcdef")
            assert browser.clips()[browser.number[name]]["label"] == value
        sentence = f"{path}: 2 of 6 clips are labelled for blur_quality, 2 good and 0 poor"
        assert browser.server.balance() == sentence
    names = {file.name for file in path.parent.iterdir()}
    assert names == {"clips.json", *(f"{name}.mp4" for name in "abcdef")}


def test_one_goes_on_where_one_stopped(path):
    with served(path) as browser:
        browser.label("b", 1)
        browser.label("e", 0)
    with served(path) as browser:
        found = {name: browser.clips()[number]["label"] for name, number in browser.number.items()}
        assert found == {"a": None, "b": 1, "c": None, "d": None, "e": 0, "f": None}
        physics = [entry["labels"]["physics_quality"] for entry in read_list(path)]
        assert physics == [None, 1, None, None, 0, None]


@pytest.mark.parametrize("before, value, after", [
    ([None, None], 1, [1, 1]), ([None, None], 0, [0, None]), ([None, None], None, [None, None]),
    ([1, None], 0, [1, 0]),                                     # one of them is poor, and physics is not
    ([None, 1], 0, [0, 1]), ([None, 0], 0, [None, 0]), ([0, 0], 0, [0, 0]), ([1, 1], 1, [1, 1]),
    ([1, 1], 0, [0, None]),                                     # which of them is poor is not known
    ([0, None], 1, [1, 1]), ([None, 0], 1, [1, 1]),
    ([1, 1], None, [None, None]), ([0, 1], None, [None, 1]), ([1, 0], None, [1, None]),
    ([1, None], None, [1, None]),
])
def test_motion_is_physics_and_human(path, before, value, after):
    given = {name: number for name, number in zip(MOTION, before, strict=True) if number is not None}
    path.write_text(json.dumps([clip("a", **given)]))
    with served(path) as browser:
        assert browser.label("a", value) == 200
        assert motion(path, "a") == after and browser.clips()[0]["label"] == value


def test_labels_stand_where_the_entry_has_them(path):
    labels = {"human_quality": "good", "blur_quality": "poor"}
    path.write_text(json.dumps([clip("a", labels=labels, blur_quality=0)]))
    with served(path) as browser:
        assert browser.label("a", 0) == 200
    labels["physics_quality"] = 0
    assert on_disk(path)["a"] == clip("a", labels=labels, blur_quality=0)
    with served(path, "blur_quality") as browser:  # it stands in both places
        assert browser.label("a", 1) == 200
    labels["blur_quality"] = 1
    assert on_disk(path)["a"] == clip("a", labels=labels, blur_quality=1)


def test_labels_go_through_a_link_to_the_list(path, tmp_path_factory):
    real = tmp_path_factory.mktemp("elsewhere") / "real.json"
    path.rename(real)
    path.symlink_to(real)
    with served(path) as browser:
        assert browser.label("a", 1) == 200
    assert path.is_symlink() and motion(real, "a") == [1, 1]


@pytest.mark.parametrize("body", [
    '{"clip": 0, "label": true}', '{"clip": 0, "label": 1.0}', '{"clip": true, "label": 1}',
    "", "{", "[]", "1", "null", "{}", '{"clip": 0}', '{"label": 1}',
    '{"clip": 6, "label": 1}', '{"clip": -1, "label": 1}', '{"clip": "0", "label": 1}',
    '{"clip": 0.5, "label": 1}', '{"clip": null, "label": 1}', '{"clip": [0], "label": 1}',
    '{"clip": 0, "label": 2}', '{"clip": 0, "label": "1"}', '{"clip": 0, "label": {}}',
    b"\xff\xfe", "[" * 5000])
def test_wrong_labels_are_refused(path, body):
    before = path.read_text()
    with served(path) as browser:
        assert browser.post(body) == 400
        assert path.read_text() == before


def test_wrong_requests_are_refused(path):
    before, body = path.read_text(), '{"clip": 0, "label": 1}'
    with served(path) as browser:
        assert browser.post(body, "text/plain") == 400  # what a page of another site could send
        headers = {"Content-Type": "application/json"}
        assert browser("/", "POST", body, **headers).status == 400
        assert browser("/label", "POST", body, **headers, Content_Length="-1").status == 400
        assert browser("/label", "PUT", body).status == 501
        assert path.read_text() == before


def test_a_list_that_another_program_changed_is_not_overwritten(path):
    with served(path) as browser:
        path.write_text(path.read_text().replace("about a", "more about a"))
        before = path.read_text()
        answer = browser("/label", "POST", '{"clip": 0, "label": 1}', Content_Type="application/json")
        assert answer.status == 500 and b"was changed by another program; start label.py again" in answer.body
        assert path.read_text() == before


def test_a_full_disk(path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with served(path) as browser:
        monkeypatch.setattr(label, "write_json", full)
        assert browser.label("a", 1) == 500 and browser.clips()[browser.number["a"]]["label"] is None
        monkeypatch.undo()
        assert browser.label("a", 1) == 200 and motion(path, "a") == [1, 1]


# ------------------------------------------------------------------------------ the command

@pytest.mark.parametrize("name, content, sentence", [
    ("clips.jsonl", "{}", "is not a .json file, and only those can be labelled"),
    ("clips.csv", "video,prompt", "is not a .json file"),
    ("clips.json", None, "does not exist; check the path"),
    ("clips.json", "[]", "is not a list of clips"),
    ("clips.json", "{}", "is not a list of clips"),
    ("clips.json", "[1]", "is not a list of clips"),
    ("clips.json", "[", "is not valid JSON"),
    ("clips.json", json.dumps([clip("x"), {}]), "no video of .*clips.json exists, the first is .*x.mp4"),
    # Labels in a form that the page would not see are not labelled a second time.
    ("clips.json", json.dumps([clip("x", labels="good")]), r"clips.json, line 1 \(x\): \"labels\" is 'good'"),
    ("clips.json", json.dumps([clip("x", motion_quality=1)]), "physics_quality AND human_quality"),
])
def test_wrong_lists(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=sentence):
        label.Server(tmp_path / name, port=0)


def test_a_wrong_label_or_port(path):
    with pytest.raises(InputError, match="--label .*beauty"):
        label.main([str(path), "--label", "beauty"])
    with pytest.raises(InputError, match="--port .*99999"):
        label.main([str(path), "--port", "99999"])
    with label.Server(path, port=0) as server:
        sentence = f"port {server.server_port} cannot be used .*; choose another with --port"
        with pytest.raises(InputError, match=sentence):
            label.main([str(path), "--port", str(server.server_port)])


def test_from_start_to_ctrl_c(path, monkeypatch, capsys):
    """Missing videos are named and left out, numbers count the others; Ctrl-C ends with the balance."""
    path.with_name("b.mp4").unlink()
    path.with_name("d.mp4").unlink()

    def work_and_stop(server):
        assert [server.entries[i]["source_id"] for i in sorted(server.order)] == list("acef")
        server.set_label(0, 1)
        server.set_label(3, 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(label.Server, "serve_forever", work_and_stop)
    assert label.main([str(path), "--port", "0"]) == 0
    missing, start, address, _, end = capsys.readouterr().out.splitlines()
    assert missing == f"2 of 6 videos do not exist and are left out, the first is {path.with_name('b.mp4')}"
    assert start == f"{path}: 0 of 4 clips are labelled for motion_quality, 0 good and 0 poor"
    assert address.startswith("open http://127.0.0.1:") and address.endswith("in a browser; Ctrl-C stops it")
    assert end == f"{path}: 2 of 4 clips are labelled for motion_quality, 1 good and 1 poor"
