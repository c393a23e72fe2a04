"""Video in and out: decode and write clips, read pictures, and measure frames.

Frames are uint8 (T, H, W, 3), RGB, as a player shows them. A clip that cannot be read is an error that names
the file; it is never replaced by another clip.
"""
import struct
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace

from files import InputError, atomic_write

HDR = {16: "PQ", 18: "HLG"}  # FFmpeg's numbers of the transfer curves of high dynamic range

# ------------------------------------------------------------------------------ reading


def read_video(path, fps=16, frames=None, size=None):
    """Decode a clip to uint8 (T, H, W, 3).

    For each time 0, 1/fps, 2/fps, ... the result has the source frame that a player would show at that time.
    T is 1 + 4n, as the VAE needs: exactly `frames` if given, else as many as the clip has. `size` = (width,
    height): scaled to cover it, then cut to it around the centre; the default is the size that a player with
    square pixels shows. Decodes no more than it needs.
    Raises InputError if the file is missing, damaged, cut short, not a video, or has fewer than `frames`
    (without them: 5) frames.
    """
    if frames is not None and frames % 4 != 1:
        raise InputError(f"{frames} frames do not fit the VAE; ask for 1 + 4n, such as 81")
    pictures = []
    for frame, aspect in islice(_shown_frames(path, fps), frames):
        pictures.append(_picture(frame, size, aspect))
        size = size or pictures[0].shape[1::-1]  # a recorded broadcast may change its size
    _check_length(path, len(pictures), frames, fps)
    usable = 1 + (len(pictures) - 1) // 4 * 4
    return torch.stack(pictures[:usable])  # (T, H, W, 3)


def check_video(path, fps=16, frames=None):
    """Decode what `read_video` would need, and raise the InputError that it would.

    Returns sentences about a clip that can be read but will look wrong: it is HDR or interlaced.
    """
    found, warnings = 0, set()
    for frame, _ in islice(_shown_frames(path, fps), frames):
        found += 1
        if frame.color_trc in HDR:
            warnings.add(f"{path} is HDR ({HDR[frame.color_trc]}) and its colours will look washed out; "
                         f"convert it with ffmpeg -i IN -vf zscale=t=linear:npl=100,tonemap=hable,"
                         f"zscale=p=bt709:t=bt709:m=bt709,format=yuv420p OUT")
        if frame.interlaced_frame:
            warnings.add(f"{path} is interlaced and what moves will have combs; "
                         f"deinterlace it with ffmpeg -i IN -vf bwdif=0 OUT")
    _check_length(path, found, frames, fps)
    return sorted(warnings)


def read_image(path, size=None):
    """A jpg or png as float (3, H, W) in [-1, 1]; `size` as in `read_video`. Raises InputError likewise."""
    frame, _ = next(_shown_frames(path, 1))  # the pixels of pictures are square, whatever their files say
    return to_tensor(_picture(frame, size)[None])[:, 0]  # (3, H, W)


def _shown_frames(path, fps):
    """Yield the decoded frame that is on the screen 0, 1/fps, 2/fps, ... seconds after the first one, each
    with the aspect of its pixels: how many times as wide as high they are."""
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
            rate = stream.average_rate
            aspect = stream.sample_aspect_ratio or 1
            if not 1 / 20 < aspect < 20:
                raise InputError(f"{path} says that its pixels are {aspect} times as wide as high; "
                                 f"write it again with the right aspect")
            is_avi = container.format.name == "avi"
            step = 1 / _rate(fps)
            # Stamps are whole ticks, so a frame may be stamped half a tick late: 62.5 ms as 63 in an mkv.
            due = min(tick / 2, Fraction(1, 1000))
            shown = first = end = repeated = None
            for frame in _decode(container, stream):
                if isinstance(frame, av.Packet):
                    repeated = (frame.pts + frame.duration) * tick
                    continue
                stamp = frame.pts
                if is_avi and frame.dts is not None:  # AVI has no stamps; FFmpeg's guess fails for B-frames
                    stamp = frame.dts
                elif is_avi and end is not None:  # the last frames that the decoder held back
                    stamp = end / tick
                if frame.is_corrupt or stamp is None:
                    raise InputError(damaged)
                now = stamp * tick
                while shown is not None and first + due < now:
                    yield shown, aspect
                    due += step
                if first is None:
                    first = now
                shown = frame
                end = now + (frame.duration * tick or (1 / rate if rate else 0))
            if shown is None:
                raise InputError(damaged)
            end = max(end, repeated or end)

            # A file that was cut still announces its whole length. The container's may be that of its sound,
            # and counts from 0 even if the first stamp is later.
            length, start = stream.duration and stream.duration * tick, first
            if length is None and container.duration and len(container.streams) == 1:
                length, start = Fraction(container.duration, av.time_base), min(first, 0)
            if length and rate and end - start < length - Fraction(3, 2) / rate:
                raise InputError(f"{path} stops after {float(end - start):.2f} of {float(length):.2f} "
                                 f"seconds; copy or make it again")
            while first + due < end:
                yield shown, aspect
                due += step
    except (av.FFmpegError, OSError):
        raise InputError(damaged) from None


def _decode(container, stream):
    """Yield the decoded frames, and as they are those packets that are empty: Theora repeats a picture so."""
    for packet in container.demux(stream):
        if packet.size or packet.pts is None:  # the last packet has no stamp: it empties the decoder
            yield from packet.decode()
        else:
            yield packet


def _check_length(path, found, frames, fps):
    if found < (frames or 5):
        raise InputError(f"{path} has {found} frames at {fps} fps and needs {frames or 5}; "
                         f"give a longer clip or ask for fewer")


def _rate(fps):
    if not 0.01 <= fps <= 1000:
        raise InputError(f"{fps} frames per second are impossible; give a number from 0.01 to 1000")
    return Fraction(fps).limit_denominator(1001)  # 23.976... is 24000/1001


def _picture(frame, size=None, aspect=1):
    """A decoded frame -> uint8 (H, W, 3): upright, scaled to cover `size` and cut to it."""
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    shown = max(1, round(picture.shape[1] * aspect)), picture.shape[0]  # width and height on a screen

    # Phones store upright video lying down, and mirrored. The matrix says where x and y point on the screen.
    matrix = frame.side_data.get("DISPLAYMATRIX")
    x_x, x_y, _, y_x, y_y = struct.unpack("=5i", bytes(matrix)[:20]) if matrix else (1, 0, 0, 0, 1)
    if abs(x_y) > abs(x_x):  # a quarter turn
        picture, shown, x_x, y_y = picture.transpose(0, 1), shown[::-1], y_x, x_y
    picture = picture.flip([axis for axis, direction in enumerate((y_y, x_x)) if direction < 0])

    rows, columns, _ = picture.shape
    width, height = size or shown
    if (width, height) == (columns, rows) == shown:
        return picture
    scale = max(width / shown[0], height / shown[1])
    scaled = max(height, round(shown[1] * scale)), max(width, round(shown[0] * scale))
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
