"""Label clips by hand, with one key a clip, on a page that this machine alone can open.

    python label.py clips.json                                          # motion_quality, at http://127.0.0.1:8000
    python label.py clips.json --task text_alignment --port 8001

Labels go into the same clips.json, which is written whole after every key: stop at any time, go on later. All else in
it stays as it is. Clips come in a fixed random order and without names, so nothing tells which seed or model made them.

motion_quality is physics_quality AND human_quality. Good sets both to 1. Poor says that one of them is 0, not which:
physics_quality becomes 0 and human_quality stays open, or becomes 0 where physics is known to be good.
"""
import argparse
import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mimetypes import guess_type
from pathlib import Path

import parallel
from data import TASKS, label, read_list
from files import InputError, read_json, write_json


class Server(ThreadingHTTPServer):
    """The list, and the page for one task. A clip's number is its place in the page's order; port 0 is any free one."""

    def __init__(self, path, task="motion_quality", port=8000):
        self.path, self.task, self.lock = Path(path), task, threading.Lock()
        if self.path.suffix != ".json":
            raise InputError(f"{path} is no .json file, and only those are labelled; write the list as one")
        self.read()
        videos = [entry["video_path"] or "an empty video_path" for entry in self.entries]
        self.missing = [video for video in videos if not Path(video).is_file()]
        if len(self.missing) == len(videos):
            raise InputError(f"no video of {path} exists, the first is {videos[0]}; give paths relative to the list")
        shuffled = random.Random(0).sample(range(len(videos)), len(videos))
        self.order = [i for i in shuffled if videos[i] not in self.missing]
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port} cannot be used ({error}); choose another with --port") from None

    def read(self):
        self.entries, self.content = read_list(self.path), self.path.read_bytes()

    def clips(self):
        """What the page may know of each clip."""
        return [{"caption": self.entries[i]["long_caption"], "label": label(self.entries[i]["labels"], self.task)}
                for i in self.order]

    def balance(self):
        values = [clip["label"] for clip in self.clips()]
        return (f"{self.path}: {len(values) - values.count(None)} of {len(values)} clips are labelled for {self.task}, "
                f"{values.count(1)} good and {values.count(0)} poor")

    def set_label(self, number, value):
        """Write a clip's label into the list: 1, 0, or None to take it away."""
        if number not in range(len(self.order)) or value not in (0, 1, None):
            raise ValueError
        with self.lock:
            if self.path.read_bytes() != self.content:
                raise InputError(f"{self.path} was changed by another program; start label.py again")
            given, i = read_json(self.path), self.order[number]
            own = given[i]["labels"] if isinstance(given[i].get("labels"), dict) else given[i]
            own.update(changes(self.entries[i]["labels"], self.task, value))
            write_json(self.path, given)
            self.read()


def changes(labels, task, value):
    """{name: 1, 0 or None}: what to change in a clip's labels for its label to become `value`."""
    parts = ("physics_quality", "human_quality") if task == "motion_quality" else (task,)
    before = label(labels, task)
    if value == before:
        return {}
    if value == 1:
        return dict.fromkeys(parts, 1)
    changed = {} if before is None else {part: None for part in parts if labels[part] == before}
    if value == 0:
        changed[next(part for part in parts if (labels | changed)[part] != 1)] = 0
    return changed


class Handler(BaseHTTPRequestHandler):
    """The page, its clips, the videos by number, and POST /label of {"clip": number, "label": 1, 0 or null}."""

    def do_GET(self):
        server, video = self.server, re.fullmatch(r"/video/([0-9]{1,9})", self.path)
        if self.path == "/":
            self.answer(200, PAGE, "text/html; charset=utf-8")
        elif self.path == "/clips":
            self.answer(200, json.dumps({"task": server.task, "clips": server.clips()}), "application/json")
        elif video and int(video[1]) < len(server.order):
            self.video(server.entries[server.order[int(video[1])]]["video_path"])
        else:
            self.answer(404, "there is no such page")

    def video(self, path):
        """A file, or the part of it that the Range header asks for: browsers play mp4 in parts."""
        try:
            content, kind = Path(path).read_bytes(), guess_type(path)[0] or "application/octet-stream"
        except OSError:
            return self.answer(404, "this video cannot be read any more")
        asked = re.fullmatch(r"bytes=([0-9]{1,15})-([0-9]{0,15})", self.headers.get("Range", ""))
        part = content[int(asked[1]):int(asked[2]) + 1 if asked[2] else None] if asked else b""
        if part:
            where = f"bytes {int(asked[1])}-{int(asked[1]) + len(part) - 1}/{len(content)}"
            self.answer(206, part, kind, {"Content-Range": where})
        else:  # ranges of another kind may be ignored
            self.answer(200, content, kind, {"Accept-Ranges": "bytes"})

    def do_POST(self):
        try:
            # A page of another site cannot send this type: the browser would ask us first, and gets no consent.
            if self.path != "/label" or self.headers.get_content_type() != "application/json":
                raise ValueError
            given = json.loads(self.rfile.read(min(200, max(0, int(self.headers["Content-Length"])))))
            self.server.set_label(given["clip"], given["label"])
            self.answer(200, "saved")
        except (InputError, OSError) as error:  # the list was changed, or the disk is full: nothing is lost
            self.answer(500, f"not saved: {error}")
        except (ValueError, TypeError, KeyError):
            self.answer(400, 'POST /label takes {"clip": number, "label": 1, 0 or null} as application/json')

    def answer(self, code, content, kind="text/plain; charset=utf-8", headers={}):
        content = content.encode() if isinstance(content, str) else content
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": len(content), "Cache-Control": "no-store", **headers}.items():
            self.send_header(name, value)
        try:
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:  # a browser that has enough of a video hangs up
            pass

    def log_message(self, *_):
        pass


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>label clips</title>
<style>
  body { max-width: 70em; margin: auto; text-align: center; font: 1.1em sans-serif; background: #222; color: #eee }
  video { width: 100%; height: 62vh; background: #000 }
  button { font: inherit; padding: .4em 1em }
</style>
<p id="progress"></p><video autoplay loop muted playsinline></video><p id="caption"></p>
<p><button value="1">1 good</button> <button value="0">0 poor</button> <button value="s">s later</button>
   <button value="b">b back</button> <button value=" ">space pause</button></p><p id="message"></p>
<script>
const video = document.querySelector("video"), values = { 1: 1, 0: 0, s: null };  // s takes a label away
const before = [];                        // the clips that were shown before this one
let task, clips, now = -1, busy = false;  // now: the clip on the page, -1 when all are labelled
const say = (id, text) => { document.getElementById(id).textContent = text; };
const count = value => clips.filter(clip => clip.label === value).length;

function show(number) {
  now = number;
  if (now < 0) { video.removeAttribute("src"); video.load(); } else video.src = "/video/" + now;
  say("progress", `${task}: ${clips.length - count(null)} of ${clips.length} labelled`);
  say("caption", now < 0 ? `All are labelled: ${count(1)} good, ${count(0)} poor.` : clips[now].caption);
  say("message", now < 0 || clips[now].label === null ? "" : clips[now].label ? "labelled good" : "labelled poor");
}
function next() {  // the first without a label after this one, round the list
  const number = clips.map((_, i) => (now + 1 + i) % clips.length).find(i => clips[i].label === null) ?? -1;
  if (now >= 0 && number !== now) before.push(now);
  show(number);
}
async function press(key) {
  if (busy) return;
  if (key === " ") { if (video.paused) video.play(); else video.pause(); }
  if ((key === "b" || key === "backspace") && before.length) show(before.pop());
  if (!(key in values) || now < 0) return;
  busy = true;
  const body = JSON.stringify({ clip: now, label: values[key] }), headers = { "Content-Type": "application/json" };
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
for (const button of document.querySelectorAll("button")) button.onclick = () => { button.blur(); press(button.value); };
video.onerror = () => say("message", "this clip does not play here; press s");
fetch("/clips").then(answer => answer.json()).then(found => { ({ task, clips } = found); next(); });
</script></html>
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description="Label clips by hand, with one key a clip, on a local page.")
    parser.add_argument("list", help="the clips: a .json list, which the labels are written into")
    parser.add_argument("--task", default="motion_quality", choices=TASKS, help="what is labelled; poor motion_quality sets "
                        "physics_quality to 0 and leaves human_quality open (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="of the page's address (default: %(default)s)")
    args = parser.parse_args(argv)
    with Server(args.list, args.task, args.port) as server:
        if server.missing:
            print(f"{len(server.missing)} of {len(server.entries)} videos do not exist and are left out, "
                  f"the first is {server.missing[0]}")
        print(f"{server.balance()}\nopen http://127.0.0.1:{server.server_port} in a browser; Ctrl-C here ends", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            with server.lock:  # not while a label is being written
                print(f"\n{server.balance()}")
    return 0


if __name__ == "__main__":
    parallel.run(main)
