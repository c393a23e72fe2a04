"""Label clips by hand, one key per clip, on a page that only this machine can open.

    python label.py clips.json                          # motion_quality, at http://127.0.0.1:8000
    python label.py clips.json --label text_alignment --port 8001

Labels go into the same clips.json, which is written atomically after every key: you can stop at any time and
go on later. Everything else in it stays as it is. Clips come in a fixed random order and without names, so
nothing tells which seed or model made them.

motion_quality is physics_quality AND human_quality. Good sets both to 1. Poor says that one of them is 0, but
not which: physics_quality becomes 0 and human_quality stays open, or becomes 0 if physics is known to be
good.
"""
import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mimetypes import guess_type
from pathlib import Path

import cli
from annotations import read_list
from clips import LABELS, label_of
from files import InputError, read_json, write_json


class Server(ThreadingHTTPServer):
    """The list of clips, and the page for one label. A clip's number is its place in the page's order.

    port: 0 for any free one.
    """

    def __init__(self, path, label="motion_quality", port=8000):
        self.path = Path(path)
        self.label = label
        self.lock = threading.Lock()
        if self.path.suffix != ".json":
            raise InputError(f"{path} is not a .json file, and only those can be labelled; "
                             f"convert the list to .json")
        self.read()

        # A fixed random order of the clips whose videos exist.
        videos = [entry["video_path"] or "an empty video_path" for entry in self.entries]
        self.missing = [video for video in videos if not Path(video).is_file()]
        if len(self.missing) == len(videos):
            raise InputError(f"no video of {path} exists, the first is {videos[0]}; "
                             f"give paths relative to the list")
        shuffled = random.Random(0).sample(range(len(videos)), len(videos))
        self.order = [i for i in shuffled if videos[i] not in self.missing]
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port} cannot be used ({error}); choose another with --port") from None

    def read(self):
        self.entries = read_list(self.path)
        self.content = self.path.read_bytes()

    def clips(self):
        """What the page may know of each clip."""
        known = []
        for i in self.order:
            entry = self.entries[i]
            known.append({"caption": entry["long_caption"], "label": label_of(entry["labels"], self.label)})
        return known

    def balance(self):
        values = [clip["label"] for clip in self.clips()]
        labelled = len(values) - values.count(None)
        return (f"{self.path}: {labelled} of {len(values)} clips are labelled for {self.label}, "
                f"{values.count(1)} good and {values.count(0)} poor")

    def set_label(self, number, value):
        """Write a clip's label into the list: 1, 0, or None to remove it."""
        if number not in range(len(self.order)) or value not in (0, 1, None):
            raise ValueError
        with self.lock:
            if self.path.read_bytes() != self.content:
                raise InputError(f"{self.path} was changed by another program; start label.py again")
            given = read_json(self.path)
            i = self.order[number]
            has_labels = isinstance(given[i].get("labels"), dict)
            target = given[i]["labels"] if has_labels else given[i]
            target.update(changes(self.entries[i]["labels"], self.label, value))
            write_json(self.path, given)
            self.read()


def changes(labels, name, value):
    """{annotation: 1, 0 or None}: what to change in a clip's labels to make the label `name` be `value`."""
    parts = ("physics_quality", "human_quality") if name == "motion_quality" else (name,)
    before = label_of(labels, name)
    if value == before:
        return {}
    if value == 1:
        return dict.fromkeys(parts, 1)
    changed = {}
    if before is not None:  # remove what made the label what it was
        changed = {part: None for part in parts if labels[part] == before}
    if value == 0:
        after = labels | changed
        open_part = next(part for part in parts if after[part] != 1)
        changed[open_part] = 0
    return changed


class Handler(BaseHTTPRequestHandler):
    """The page, its clips, videos by number, and POST /label of {"clip": number, "label": 1, 0 or null}."""

    def do_GET(self):
        server = self.server
        video = re.fullmatch(r"/video/([0-9]{1,9})", self.path)
        if self.path == "/":
            self.answer(200, PAGE, "text/html; charset=utf-8")
        elif self.path == "/clips":
            self.answer(200, json.dumps({"label": server.label, "clips": server.clips()}), "application/json")
        elif video and int(video[1]) < len(server.order):
            self.video(server.entries[server.order[int(video[1])]]["video_path"])
        else:
            self.answer(404, "there is no such page")

    def video(self, path):
        """A file, or the part of it that the Range header asks for: browsers play mp4 in parts."""
        try:
            content = Path(path).read_bytes()
        except OSError:
            return self.answer(404, "this video can no longer be read")
        kind = guess_type(path)[0] or "application/octet-stream"
        asked = re.fullmatch(r"bytes=([0-9]{1,15})-([0-9]{0,15})", self.headers.get("Range", ""))
        part = b""
        if asked:
            first = int(asked[1])
            part = content[first:int(asked[2]) + 1] if asked[2] else content[first:]
        if part:
            content_range = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            self.answer(206, part, kind, {"Content-Range": content_range})
        else:  # a server may ignore other kinds of ranges
            self.answer(200, content, kind, {"Accept-Ranges": "bytes"})

    def do_POST(self):
        try:
            # A page of another site cannot send this type: the browser asks us first, and we do not consent.
            if self.path != "/label" or self.headers.get_content_type() != "application/json":
                raise ValueError
            length = int(self.headers["Content-Length"])
            given = json.loads(self.rfile.read(min(200, max(0, length))))
            self.server.set_label(given["clip"], given["label"])
            self.answer(200, "saved")
        except (InputError, OSError) as error:  # the list was changed, or the disk is full: nothing is lost
            self.answer(500, f"not saved: {error}")
        except (ValueError, TypeError, KeyError):
            self.answer(400, 'POST /label takes {"clip": number, "label": 1, 0 or null} as application/json')

    def answer(self, code, content, kind="text/plain; charset=utf-8", headers=None):
        content = content.encode() if isinstance(content, str) else content
        self.send_response(code)
        headers = {"Content-Type": kind, "Content-Length": len(content), "Cache-Control": "no-store",
                   **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        try:
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:  # a browser that has enough of a video closes the connection
            pass

    def log_message(self, *_):
        pass


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>label clips</title>
<style>
  body { max-width: 70em; margin: auto; text-align: center; font: 1.1em sans-serif }
  body { background: #222; color: #eee }
  video { width: 100%; height: 62vh; background: #000 }
  button { font: inherit; padding: .4em 1em }
</style>
<p id="progress"></p><video autoplay loop muted playsinline></video><p id="caption"></p>
<p><button value="1">1 good</button> <button value="0">0 poor</button> <button value="s">s later</button>
   <button value="b">b back</button> <button value=" ">space pause</button></p><p id="message"></p>
<script>
const video = document.querySelector("video");
const values = { 1: 1, 0: 0, s: null };   // s removes a label
const before = [];                        // the clips that were shown before this one
let label, clips, busy = false;
let now = -1;                             // the clip on the page, -1 when all are labelled
const say = (id, text) => { document.getElementById(id).textContent = text; };
const count = value => clips.filter(clip => clip.label === value).length;

function show(number) {
  now = number;
  if (now < 0) { video.removeAttribute("src"); video.load(); } else video.src = "/video/" + now;
  say("progress", `${label}: ${clips.length - count(null)} of ${clips.length} labelled`);
  if (now < 0) {
    say("caption", `All are labelled: ${count(1)} good, ${count(0)} poor.`);
    say("message", "");
  } else {
    say("caption", clips[now].caption);
    say("message", { 1: "labelled good", 0: "labelled poor", null: "" }[clips[now].label]);
  }
}
function next() {  // the first clip without a label after this one, around the list
  const following = clips.map((_, i) => (now + 1 + i) % clips.length);
  const number = following.find(i => clips[i].label === null) ?? -1;
  if (now >= 0 && number !== now) before.push(now);
  show(number);
}
async function press(key) {
  if (busy) return;
  if (key === " ") { if (video.paused) video.play(); else video.pause(); }
  if ((key === "b" || key === "backspace") && before.length) show(before.pop());
  if (!(key in values) || now < 0) return;
  busy = true;
  const body = JSON.stringify({ clip: now, label: values[key] });
  const headers = { "Content-Type": "application/json" };
  try {
    const answer = await fetch("/label", { method: "POST", headers, body });
    if (answer.ok) { clips[now].label = values[key]; next(); } else say("message", await answer.text());
  } catch { say("message", "not saved: label.py does not answer; start it again"); }
  busy = false;
}
document.onkeydown = event => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " ") event.preventDefault();  // it would scroll
  press(event.key.toLowerCase());
};
for (const button of document.querySelectorAll("button")) {
  button.onclick = () => { button.blur(); press(button.value); };
}
video.onerror = () => say("message", "this clip does not play here; press s");
fetch("/clips").then(answer => answer.json()).then(found => { ({ label, clips } = found); next(); });
</script></html>
"""


def main(argv=None):
    parser = cli.Parser("Label clips by hand, one key per clip, on a local page.")
    parser.add_argument("list", help="the clips: a .json list, into which the labels are written")
    parser.add_argument("--label", default="motion_quality", choices=LABELS,
                        help="what is labelled; poor motion_quality sets physics_quality to 0 and leaves "
                             "human_quality open")
    parser.add_argument("--port", type=int, default=8000, help="port of the page's address")
    args = parser.parse_args(argv)
    with Server(args.list, args.label, args.port) as server:
        if server.missing:
            print(f"{len(server.missing)} of {len(server.entries)} videos do not exist and are left out, "
                  f"the first is {server.missing[0]}")
        print(server.balance())
        print(f"open http://127.0.0.1:{server.server_port} in a browser; Ctrl-C stops it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            with server.lock:  # not while a label is being written
                print(f"\n{server.balance()}")
    return 0


if __name__ == "__main__":
    cli.run(main)
