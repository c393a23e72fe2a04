"""Video in and out: decode and write clips, read pictures, and measure frames.

Frames are uint8 (T, H, W, 3), RGB, as a player shows them. A clip that cannot be read is an error that names
the file; it is never replaced by another clip.
"""
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace

from files import InputError, atomic_write

# ------------------------------------------------------------------------------ reading


def read_video(path, fps=16, frames=None, size=None):
    """Decode a clip to uint8 (T, H, W, 3).

    For each time 0, 1/fps, 2/fps, ... the result has the source frame that a player would show at that time.
    T is 1 + 4n, as the VAE needs: exactly `frames` if given, else as many as the clip has. `size` = (width,
    height): scaled to cover it, then cut to it around the centre. Decodes no more than it needs.
    Raises InputError if the file is missing, damaged, cut short, not a video, or has fewer than `frames`
    (without them: 5) frames.
    """
    if frames is not None and frames % 4 != 1:
        raise InputError(f"{frames} frames do not fit the VAE; ask for 1 + 4n, such as 81")
    pictures = [_picture(frame, size) for frame in islice(_shown_frames(path, fps), frames)]
    _check_length(path, len(pictures), frames, fps)
    usable = 1 + (len(pictures) - 1) // 4 * 4
    return torch.stack(pictures[:usable])  # (T, H, W, 3)


def check_video(path, fps=16, frames=None):
    """Decode what `read_video` would need, and raise the InputError that it would."""
    found = sum(1 for _ in islice(_shown_frames(path, fps), frames))
    _check_length(path, found, frames, fps)


def read_image(path, size=None):
    """A jpg or png as float (3, H, W) in [-1, 1]; `size` as in `read_video`. Raises InputError likewise."""
    frame = next(_shown_frames(path, 1))
    return to_tensor(_picture(frame, size)[None])[:, 0]  # (3, H, W)


def _shown_frames(path, fps):
    """Yield the decoded frame that is on the screen 0, 1/fps, 2/fps, ... seconds after the first one."""
    damaged = f"{path} is damaged, cut short or not a video; copy or make it again"
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; check the path")
    try:
        # An open file, not its name: FFmpeg would take some names for patterns or for addresses.
        with open(path, "rb") as file, av.open(file) as container:
            if not container.streams.video:
                raise InputError(f"{path} has no video stream; give a file with pictures")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            tick = stream.time_base
            step = 1 / _rate(fps)
            # Stamps are whole ticks, so a frame may be stamped half a tick late: 62.5 ms as 63 in an mkv.
            due = min(tick / 2, Fraction(1, 1000))
            shown = first = end = None
            for frame in container.decode(stream):
                if frame.is_corrupt or frame.pts is None:
                    raise InputError(damaged)
                now = frame.pts * tick
                while shown is not None and first + due < now:
                    yield shown
                    due += step
                if first is None:
                    first = now
                shown = frame
                end = now + (frame.duration or 0) * tick
            if shown is None:
                raise InputError(damaged)

            # A truncated file still reports its full length. The container's may be that of the audio.
            length = stream.duration and stream.duration * tick
            if length is None and container.duration and len(container.streams) == 1:
                length = Fraction(container.duration, av.time_base)
            rate = stream.average_rate
            if length and rate and end - first < length - Fraction(3, 2) / rate:
                raise InputError(f"{path} stops after {float(end - first):.2f} of {float(length):.2f} "
                                 f"seconds; copy or make it again")
            while first + due < end:
                yield shown
                due += step
    except (av.FFmpegError, OSError):
        raise InputError(damaged) from None


def _check_length(path, found, frames, fps):
    if found < (frames or 5):
        raise InputError(f"{path} has {found} frames at {fps} fps and needs {frames or 5}; "
                         f"give a longer clip or ask for fewer")


def _rate(fps):
    if fps <= 0:
        raise InputError(f"{fps} frames per second are impossible; give a number above 0")
    return Fraction(fps).limit_denominator(1001)  # 23.976... is 24000/1001


def _picture(frame, size):
    """A decoded frame -> uint8 (H, W, 3): upright, scaled to cover `size` and cut to it."""
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    picture = torch.rot90(picture, round(frame.rotation / 90))  # phones store upright video rotated
    rows, columns, _ = picture.shape
    if size is None or tuple(size) == (columns, rows):
        return picture
    width, height = size
    scale = max(width / columns, height / rows)
    scaled = max(height, round(rows * scale)), max(width, round(columns * scale))
    picture = picture.permute(2, 0, 1)[None].float()                       # (1, 3, rows, columns)
    picture = F.interpolate(picture, scaled, mode="bicubic", antialias=True)
    top = (scaled[0] - height) // 2
    left = (scaled[1] - width) // 2
    picture = picture[0, :, top:top + height, left:left + width]           # (3, height, width)
    return picture.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)  # (height, width, 3)


# ------------------------------------------------------------------------------ writing

def write_video(path, video, fps=16):
    """Write uint8 (T, H, W, 3) as an H.264 mp4 that plays anywhere. Raises InputError if H or W is odd."""
    height, width = video.shape[1:3]
    if height % 2 or width % 2:
        raise InputError(f"{path}: {width}x{height} would not play everywhere; make both sides even")
    with atomic_write(path) as beside:
        with av.open(str(beside), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=_rate(fps), options={"crf": "16"})
            stream.width = width
            stream.height = height
            stream.pix_fmt = "yuv420p"
            # Say which matrix turned RGB into YUV, or every player guesses its own colours.
            codec = stream.codec_context
            codec.colorspace = codec.color_primaries = codec.color_trc = Colorspace.ITU709
            codec.color_range = ColorRange.MPEG
            for picture in video.cpu().numpy():
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


# ------------------------------------------------------------------------------ frames as numbers

def to_tensor(video):
    """uint8 (T, H, W, 3) -> float (3, T, H, W) in [-1, 1]."""
    return video.permute(3, 0, 1, 2).float() / 127.5 - 1


def to_uint8(video):
    """float (3, T, H, W), clamped to [-1, 1] -> uint8 (T, H, W, 3)."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


def clip_statistics(video):
    """Statistics that expose degenerate video, from uint8 (T, H, W, 3), as numbers from 0 to 1.

    motion_energy: the mean difference between neighbouring frames. contrast: the standard deviation of the
    brightness. saturation: the mean distance between the largest and the smallest colour channel.
    """
    video = video.float() / 255
    return {"motion_energy": video.diff(dim=0).abs().mean().item(),
            "contrast": video.mean(-1).std().item(),
            "saturation": (video.amax(-1) - video.amin(-1)).mean().item()}
