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
import shlex
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mimetypes import guess_type
from pathlib import Path

import cli

from annotations import read_list, where
from clips import LABELS, label_of
from files import InputError, read_json, write_json

CONNECTIONS = 32  # how many may be open at once; a browser opens about six
SECONDS = 30      # how long a connection may stand still


MEANING = {  # label: (what good means, what poor means)
    "physics_quality": ("Things move, fall, collide and keep their shape as they would in the real world.",
                        "Something moves, bends, appears, vanishes or passes through other things as nothing "
                        "real would."),
    "human_quality": ("People and animals look and move like real ones. So does a clip without any.",
                      "A face, hand, limb or gait is wrong: distorted, too many, fused, or moving as no body "
                      "can."),
    "text_alignment": ("The clip shows what the caption says: the things, how many, how they look and what "
                       "they do.",
                       "Something that the caption names is missing, different, or does something else."),
    "blur_quality": ("The picture is sharp, also where things move.",
                     "The picture, or what matters in it, is blurred, smeared or ghosted.")}
MEANING["motion_quality"] = (
    "The motion is right in both respects: things obey physics, and people and animals, if there are any, "
    "look and move like real ones.",
    "One of the two is wrong: something moves or changes as nothing real would, or a face, hand, limb or "
    "gait is distorted.")


class Server(ThreadingHTTPServer):
    """The list of clips, and the page for one label. A clip's number is its place in the page's order.

    port: 0 for any free one.
    """

    def __init__(self, path, label="motion_quality", port=8000):
        self.path = Path(path)
        self.label = label
        self.lock = threading.Lock()
        self.places = threading.BoundedSemaphore(CONNECTIONS)
        if self.path.suffix != ".json":
            raise InputError(f"{path} is not a .json file, and only those can be labelled; "
                             f"convert the list to .json")
        self.entries = read_list(self.path)
        self.content = self.path.read_bytes()
        for entry in self.entries:
            labels = entry["labels"].items()
            unread = [f"{name} is {value!r:.60}; write 1, 0 or null" for name, value in labels
                      if value not in (0, 1, None)]
            for fault in entry["faults"] + unread:  # labels that would not be seen, and could get lost
                raise InputError(f"{path}, {where(entry)}{fault}")

        # A fixed random order of the clips whose videos exist.
        videos = [entry["video_path"] or "an empty video_path" for entry in self.entries]
        exists = [Path(video).is_file() for video in videos]
        self.missing = [video for video, there in zip(videos, exists, strict=True) if not there]
        if len(self.missing) == len(videos):
            raise InputError(f"no video of {path} exists, the first is {videos[0]}; "
                             f"give paths relative to the list")
        shuffled = random.Random(0).sample(range(len(videos)), len(videos))
        self.order = [i for i in shuffled if exists[i]]
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise InputError(f"port {port} cannot be used ({error}); choose another with --port") from None
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost", "[::1]")]

    def process_request(self, request, address):
        """Answer in a thread of its own; while too many connections are open, close further ones."""
        if self.places.acquire(blocking=False):
            super().process_request(request, address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, address):
        try:
            super().process_request_thread(request, address)
        finally:
            self.places.release()

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], OSError):  # a browser that goes away is not an error
            super().handle_error(request, address)

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
        if type(number) is not int or number not in range(len(self.order)):
            raise ValueError
        if value is not None and (type(value) is not int or value not in (0, 1)):
            raise ValueError
        with self.lock:
            if self.path.read_bytes() != self.content:
                raise InputError(f"{self.path} was changed by another program; start label.py again")
            given = read_json(self.path)
            i = self.order[number]
            inside = given[i].get("labels") or {}
            changed = changes(self.entries[i]["labels"], self.label, value)
            for name in changed:
                if inside:
                    inside[name] = changed[name]
                if name in given[i] or not inside:
                    given[i][name] = changed[name]
            write_json(self.path.resolve(), given)  # a link stays one
            self.entries[i]["labels"].update(changed)
            self.content = self.path.read_bytes()


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

    timeout = SECONDS

    def parse_request(self):
        """Answer requests for this page's own address alone: a site whose name leads to 127.0.0.1 sends its
        name as the Host."""
        if not super().parse_request():
            return False
        host = self.headers.get("Host", "")
        if host in self.server.hosts or f"{host}:80" in self.server.hosts:  # browsers leave :80 out
            return True
        self.answer(403, f"open http://{self.server.hosts[0]} instead")
        return False

    def do_GET(self):
        server = self.server
        video = re.fullmatch(r"/video/([0-9]{1,9})", self.path)
        if self.path == "/":
            self.answer(200, PAGE, "text/html; charset=utf-8")
        elif self.path == "/clips":
            good, poor = MEANING[server.label]
            about = {"label": server.label, "good": good, "poor": poor, "list": shlex.quote(str(server.path)),
                     "clips": server.clips()}
            self.answer(200, json.dumps(about), "application/json")
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
            for start in range(0, len(content), 2**20):  # each part has its own time limit
                self.wfile.write(content[start:start + 2**20])
        except OSError:  # a browser that has enough of a video closes the connection, or stops reading
            self.close_connection = True

    def log_message(self, *_):
        pass


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>label clips</title>
<style>
  body { max-width: 70em; margin: auto; text-align: center; font: 1.1em sans-serif }
  body { background: #222; color: #eee }
  video { width: 100%; height: 62vh; background: #000 }
  button { font: inherit; padding: .4em 1em }
  .meaning { margin: .3em; font-size: .9em; color: #bbb }
  .finished .only-clips, :not(.finished) > .only-finished { display: none }
  .finished #caption { margin-top: 25vh; font-size: 1.4em }
  code { background: #000; padding: .3em .6em; user-select: all }
</style>
<p id="progress"></p><video class="only-clips" autoplay loop muted playsinline></video><p id="caption"></p>
<p class="meaning only-clips"><b>good:</b> <span id="good"></span></p>
<p class="meaning only-clips"><b>poor:</b> <span id="poor"></span></p>
<p class="only-finished">Everything is saved. Close this page, and end label.py with Ctrl-C. Next:</p>
<p class="only-finished"><code id="next"></code></p>
<p><button class="only-clips" value="1">1 good</button> <button class="only-clips" value="0">0 poor</button>
   <button class="only-clips" value="s">s later</button> <button value="b">b back</button>
   <button class="only-clips" value=" ">space pause</button></p><p id="message"></p>
<script>
const video = document.querySelector("video");
const values = { 1: 1, 0: 0, s: null };   // s removes a label
const before = [];                        // the clips that "back" goes to, the last one first
let about, clips, busy = false;
let now = -1;                             // the clip on the page, -1 when all are labelled
const say = (id, text) => { document.getElementById(id).textContent = text; };
const count = value => clips.filter(clip => clip.label === value).length;

function show(number) {
  now = number;
  document.body.classList.toggle("finished", now < 0);
  if (now < 0) { video.removeAttribute("src"); video.load(); } else video.src = "/video/" + now;
  say("progress", `${about.label}: ${clips.length - count(null)} of ${clips.length} labelled`);
  if (now < 0) {
    say("caption", `All ${clips.length} clips are labelled: ${count(1)} good, ${count(0)} poor.`);
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
  if (key === " " && now >= 0) { if (video.paused) video.play(); else video.pause(); }
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
fetch("/clips").then(answer => answer.json()).then(found => {
  about = found;
  clips = about.clips;
  clips.forEach((clip, i) => clip.label === null || before.push(i));
  say("good", about.good);
  say("poor", about.poor);
  say("next", `python data.py --list ${about.list} --model MODEL --output data/train`);
  next();
});
</script></html>
"""


def main(argv=None):
    parser = cli.Parser("Label clips by hand, one key per clip, on a local page.")
    parser.add_argument("list", help="the clips: a .json list, into which the labels are written")
    parser.add_argument("--label", default="motion_quality", choices=LABELS,
                        help="what is labelled; poor motion_quality sets physics_quality to 0 and leaves "
                             "human_quality open")
    parser.add_argument("--port", type=cli.whole(0, 65_535), default=8000, help="port of the page's address")
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
