"""Video as people have it: seventy odd files, and each is read as a player shows it.

They are all made here, from a picture whose brightness counts the frames and whose corners are red, green,
blue and grey: order, direction, mirroring and aspect show. PyAV writes most of them; the others need ffmpeg.
"""
import shutil
import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from files import InputError
from video import check_video, read_video

COUNT = 17  # frames: 1 + 4n, so that losing one loses four
SIZE = 64, 48
SHARP = {"b": "4M"}
QUIET = {"x265-params": "log-level=none"}


def picture(n, width, height):
    """uint8 (H, W, 3): frame n of every video, drawn at a size."""
    drawn = np.full((height, width, 3), 40 + 10 * n, np.uint8)
    rows, columns = round(height * 3 / 8), round(width * 3 / 8)
    drawn[:rows, :columns] = 210, 40, 40
    drawn[:rows, width - columns:] = 40, 180, 40
    drawn[height - rows:, :columns] = 40, 40, 210
    return drawn


def write(path, encoder, layout, size=SIZE, rate=16, stamps=range(COUNT), tick=None, aspect=None, turn=None,
          transfer=None, sound=0, container=None, **options):
    """Write frame i to be shown at tick stamps[i].

    `turn` = (degrees counterclockwise, mirrored); `sound`: seconds of it; `container`: options of the file,
    and the others are options of the encoder.
    """
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(encoder, rate=rate, options=options)
        silence = file.add_stream("aac", rate=16000) if sound else None
        (stream.width, stream.height), stream.pix_fmt = size, layout
        codec = stream.codec_context
        codec.time_base = tick or 1 / Fraction(rate)
        codec.sample_aspect_ratio = aspect or Fraction(0)  # not specified
        codec.color_trc = transfer or 2
        if turn:
            stream.set_display_rotation(*turn)
        for n, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(picture(n, *size))
            frame.pts, frame.time_base = stamp, codec.time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        for n in range(round(sound * 16000 / 1024)):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 1024 * n, Fraction(1, 16000)
            file.mux(silence.encode(frame))


def at(rate):
    """The frames that are shown at 16 fps of a video with another rate."""
    shown = [int(i * rate / 16) for i in range(8 * COUNT) if i * rate / 16 < COUNT]
    return shown[:1 + (len(shown) - 1) // 4 * 4]


SLOW = [0, 1, 2, 3, 9, 12, 30, 31, 40, 41, 42, 60, 70, 80, 81, 82, 92]  # 1/48 s
SLOW_SHOWN = [sum(stamp <= 3 * i for stamp in SLOW) - 1 for i in range(29)]

# Name of the file; encoder and pixel format; arguments of `write`; arguments of `compare`, where they are not
# all frames at the size in which they were written.
WRITTEN = [
    ("h264.mp4", "libx264 yuv420p", {}, {}),
    ("h264.mkv", "libx264 yuv420p", {}, {}),
    ("h264.ts", "libx264 yuv420p", {}, {}),
    ("h264.flv", "libx264 yuv420p", {}, {}),
    ("b_frames.avi", "libx264 yuv420p", {"bf": "3"}, {}),
    ("fragments.mp4", "libx264 yuv420p", {"container": {"movflags": "frag_keyframe+empty_moov"}}, {}),
    ("full_range.mp4", "libx264 yuvj420p", {}, {}),
    ("h264_422_10bit.mp4", "libx264 yuv422p10le", {}, {}),
    ("h264_444.mp4", "libx264 yuv444p", {}, {}),
    ("h264_rgb.mkv", "libx264rgb rgb24", {}, {}),
    ("hevc.mp4", "libx265 yuv420p", QUIET, {}),
    ("hevc_10bit.mkv", "libx265 yuv420p10le", QUIET, {}),
    ("vp8.webm", "libvpx yuv420p", {}, {}),
    ("vp9.webm", "libvpx-vp9 yuv420p", {}, {}),
    ("transparent.webm", "libvpx-vp9 yuva420p", {}, {}),
    ("av1.mp4", "libsvtav1 yuv420p", {"preset": "10"}, {}),
    ("av1_10bit.mkv", "libsvtav1 yuv420p10le", {"preset": "10"}, {}),
    ("prores.mov", "prores_ks yuv422p10le", {}, {}),
    ("prores_4444.mov", "prores_ks yuva444p10le", {}, {}),
    ("dnxhr.mov", "dnxhd yuv422p", {"size": (256, 128), "profile": "dnxhr_lb"}, {}),
    ("animation.mov", "qtrle rgb24", {}, {}),
    ("animation.apng", "apng rgb24", {}, {}),
    ("mjpeg.avi", "mjpeg yuvj420p", {}, {}),
    ("mpeg4.avi", "mpeg4 yuv420p", SHARP, {}),
    ("mpeg2.vob", "mpeg2video yuv420p", {"rate": 25, **SHARP}, {"frames": at(25)}),
    ("mpeg1.mpg", "mpeg1video yuv420p", {"rate": 25, **SHARP}, {"frames": at(25)}),
    ("wmv2.wmv", "wmv2 yuv420p", SHARP, {}),
    ("lossless_10bit.mkv", "ffv1 gbrp10le", {}, {}),
    ("grey.mkv", "ffv1 gray", {}, {"grey": True}),
    ("huffyuv.avi", "huffyuv rgb24", {}, {}),
    ("raw.y4m", "wrapped_avframe yuv420p", {}, {}),
    # odd sizes
    ("odd_sides.mp4", "libx264 yuv444p", {"size": (63, 47)}, {}),
    ("odd_sides.webm", "libvpx-vp9 yuv420p", {"size": (63, 47)}, {}),
    ("tiny.mp4", "libx264 yuv420p", {"size": (16, 16), "crf": "10"}, {}),
    ("8192x4320.mp4", "libx264 yuv420p", {"size": (8192, 4320), "stamps": [0], "preset": "ultrafast"},
     {"frames": [0]}),
    # turned and mirrored
    ("turned_left.mp4", "libx264 yuv420p", {"turn": (90, False)}, {"turn": (1, False), "size": (48, 64)}),
    ("turned_over.mov", "libx264 yuv420p", {"turn": (180, False)}, {"turn": (2, False)}),
    ("turned_right.mp4", "libx264 yuv420p", {"turn": (-90, False)}, {"turn": (3, False), "size": (48, 64)}),
    ("mirrored.mp4", "libx264 yuv420p", {"turn": (0, True)}, {"turn": (0, True)}),
    ("mirrored_left.mp4", "libx264 yuv420p", {"turn": (90, True)}, {"turn": (1, True), "size": (48, 64)}),
    # the aspect of pixels
    ("pal_4_3.mp4", "libx264 yuv420p", {"size": (90, 72), "aspect": Fraction(16, 15)}, {"size": (96, 72)}),
    ("pal_16_9.mkv", "libx264 yuv420p", {"size": (90, 72), "aspect": Fraction(64, 45)}, {"size": (128, 72)}),
    ("ntsc.mp4", "libx264 yuv420p", {"size": (90, 60), "aspect": Fraction(8, 9)}, {"size": (80, 60)}),
    ("wide_turned.mp4", "libx264 yuv420p", {"aspect": Fraction(3, 2), "turn": (90, False)},
     {"turn": (1, False), "size": (48, 96)}),
    ("phone.3gp", "h263 yuv420p", {"size": (176, 144), "aspect": Fraction(12, 11)}, {"size": (192, 144)}),
    # times
    ("12_fps.mp4", "libx264 yuv420p", {"rate": 12}, {"frames": at(12)}),
    ("29.97_fps.mp4", "libx264 yuv420p", {"rate": Fraction(30000, 1001)}, {"frames": at(29.97)}),
    ("60_fps.mkv", "libx264 yuv420p", {"rate": 60, "crf": "10"}, {"frames": at(60)}),
    ("variable.mp4", "libx264 yuv420p", {"stamps": SLOW, "tick": Fraction(1, 48)}, {"frames": SLOW_SHOWN}),
    ("variable.mkv", "libx264 yuv420p", {"stamps": SLOW, "tick": Fraction(1, 48)}, {"frames": SLOW_SHOWN}),
    ("long_sound.mp4", "libx264 yuv420p", {"sound": 3}, {}),
    ("long_sound.mkv", "libx264 yuv420p", {"sound": 3}, {}),
    ("late.mp4", "libx264 yuv420p", {"stamps": range(32, 32 + COUNT)}, {}),
    ("late.mkv", "libx264 yuv420p", {"stamps": range(32, 32 + COUNT)}, {}),
    ("late.webm", "libvpx-vp9 yuv420p", {"stamps": range(32, 32 + COUNT)}, {}),
    ("late.flv", "libx264 yuv420p", {"stamps": range(32, 32 + COUNT)}, {}),
    ("negative.ts", "libx264 yuv420p", {  # stamps have 33 bits; those before the wrap become negative
        "stamps": range(2**33 - 30000, 2**33 + 80000, 5625)[:COUNT], "tick": Fraction(1, 90000)}, {}),
    ("edit_list.mp4", "libx264 yuv420p", {
        "stamps": range(-8, 9), "container": {"avoid_negative_ts": "disabled"}}, {"frames": range(8, 17)}),
    ("skipped.avi", "mpeg4 yuv420p", {"stamps": range(0, 2 * COUNT, 2), **SHARP}, {"frames": at(8)[:33]}),
    # read with a warning
    ("hdr_pq.mp4", "libx265 yuv420p10le", {"transfer": 16, **QUIET}, {"warning": "PQ"}),
    ("hdr_hlg.mkv", "libx265 yuv420p10le", {"transfer": 18, **QUIET}, {"warning": "HLG"}),
    ("interlaced.ts", "libx264 yuv420p", {"rate": 25, "flags": "+ildct+ilme"},
     {"frames": at(25), "warning": "interlaced"}),
    ("dv.avi", "dvvideo yuv420p", {"size": (720, 576), "rate": 25, "stamps": range(9)},
     {"frames": at(25)[:5], "size": (768, 576), "warning": "interlaced"}),
]

# Name of the file; arguments of ffmpeg; arguments of `compare`.
BY_FFMPEG = [
    ("theora.ogv", "-c:v libtheora -q:v 9", {}),
    ("repeats.ogv", "-vf fps=48 -c:v libtheora -q:v 9", {}),
    ("repeats_at_the_end.ogv",
     "-vf tpad=stop_mode=clone:stop=4 -c:v libtheora -q:v 9 -g 64 -page_duration 9999999",
     {"frames": [*range(COUNT), *[COUNT - 1] * 4]}),
    ("packed_b_frames.avi", "-c:v libxvid -bf 2 -q:v 2",  # an AVI has nothing at one of its times
     {"frames": [*range(9), *range(8, COUNT - 1)]}),
    ("wide.webm", "-vf setsar=3/2 -c:v libvpx-vp9", {"size": (96, 48)}),
    ("vp9_10bit.webm", "-c:v libvpx-vp9 -pix_fmt yuv420p10le", {}),
    ("animation.gif", "-vf settb=1/100,setpts=8*N,fps=12.5,split[a][b];[a]palettegen[p];[b][p]paletteuse",
     {"frames": at(12.5)}),
]


def expect(n, size, cut=None, turn=(0, False), grey=False):
    """What a player shows of frame n at `size`, or covering `cut` and cut to it: float (H, W, 3).

    `turn` = (quarters counterclockwise, mirrored).
    """
    quarters, mirrored = turn
    width, height = size
    if cut:
        scale = max(cut[0] / width, cut[1] / height)
        width, height = round(width * scale), round(height * scale)
    drawn = picture(n, *((height, width) if quarters % 2 else (width, height)))
    drawn = np.rot90(drawn, quarters)
    if mirrored:
        drawn = drawn[:, ::-1]
    if cut:
        top, left = (height - cut[1]) // 2, (width - cut[0]) // 2
        drawn = drawn[top:top + cut[1], left:left + cut[0]]
    drawn = torch.from_numpy(drawn.copy()).float()
    return (drawn @ torch.tensor([0.299, 0.587, 0.114]))[..., None].expand_as(drawn) if grey else drawn


def compare(path, size=SIZE, frames=range(COUNT), warning=None, **looks):
    """Read a video whole, and cut to a square; every frame must be the one that a player shows."""
    count = len(frames) if len(frames) < 5 else None
    for cut in (None, (40, 40)):
        video = read_video(path, frames=count, size=cut).float()
        width, height = cut or size
        assert video.shape == (len(frames), height, width, 3)
        for shown, n in zip(video, frames, strict=True):
            middle = shown[height * 7 // 16:height * 9 // 16, width * 7 // 16:width * 9 // 16]
            assert abs(middle.mean() - 40 - 10 * n) < 5
            assert (shown - expect(n, size, cut, **looks)).abs().mean() < 8
    warnings = check_video(path, frames=count)
    assert len(warnings) == (warning is not None)
    for sentence in warnings:
        assert sentence.startswith(f"{path} is ") and warning in sentence and "with ffmpeg -i" in sentence


@pytest.mark.parametrize("name, encoder, how, shown", WRITTEN, ids=[row[0] for row in WRITTEN])
def test_a_video_is_read_as_a_player_shows_it(tmp_path, name, encoder, how, shown):
    write(tmp_path / name, *encoder.split(), **how)
    compare(tmp_path / name, **{"size": how.get("size", SIZE)} | shown)


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the program ffmpeg: apt-get install ffmpeg")
@pytest.mark.parametrize("name, arguments, shown", BY_FFMPEG, ids=[row[0] for row in BY_FFMPEG])
def test_a_video_by_ffmpeg_is_read_as_a_player_shows_it(tmp_path, name, arguments, shown):
    source = b"".join(picture(n, *SIZE).tobytes() for n in range(COUNT))
    words = "ffmpeg -v error -f rawvideo -pix_fmt rgb24 -s {}x{} -r 16 -i -".format(*SIZE).split()
    subprocess.run([*words, *arguments.split(), str(tmp_path / name)], input=source, check=True)
    compare(tmp_path / name, **shown)


def test_a_video_that_changes_its_size_is_read_in_the_first_one(tmp_path):
    for name, size in (("small.mjpeg", (64, 48)), ("large.mjpeg", (128, 96))):
        write(tmp_path / name, "mjpeg", "yuvj420p", size=size, rate=25)
    both = (tmp_path / "small.mjpeg").read_bytes() + (tmp_path / "large.mjpeg").read_bytes()
    (tmp_path / "both.mjpeg").write_bytes(both)
    assert read_video(tmp_path / "both.mjpeg", fps=25).shape == (33, 48, 64, 3)


@pytest.mark.parametrize("name", ["late.mkv", "late.webm", "late.mp4"])
def test_a_late_video_that_was_cut_is_named(tmp_path, name):
    encoder = "libvpx-vp9" if name.endswith("webm") else "libx264"
    write(tmp_path / name, encoder, "yuv420p", stamps=range(32, 32 + COUNT))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:len(whole) * 3 // 4])
    with pytest.raises(InputError, match=f"{name} (stops after|is damaged|has no)"):
        read_video(tmp_path / name)


@pytest.mark.parametrize("aspect", [Fraction(40), Fraction(1, 40)])
def test_pixels_of_an_impossible_aspect_are_refused(tmp_path, aspect):
    write(tmp_path / "a.mp4", "libx264", "yuv420p", aspect=aspect)
    with pytest.raises(InputError, match=f"a.mp4 says that its pixels are {aspect} times as wide"):
        read_video(tmp_path / "a.mp4")
