"""Video in and out: what is written comes back, at every rate, size and rotation; bad files are named."""
import av
import numpy as np
import pytest
import torch

from files import InputError
from video import check_video, clip_statistics, read_image, read_video, to_tensor, to_uint8, write_video

torch.set_num_threads(1)  # everything here is tiny: more threads only get in each other's way

COLOURS = torch.tensor([[250, 20, 20], [20, 240, 30], [10, 30, 250],
                        [255, 255, 255], [0, 0, 0], [200, 120, 40]], dtype=torch.uint8)


def coloured(count, height=32, width=48):
    """uint8 (count, H, W, 3): frame i is all of colour i, so that a decoded frame tells which one it was."""
    return COLOURS[torch.arange(count) % len(COLOURS)][:, None, None].expand(count, height, width, 3)


def which(video):
    """For each frame the number of the colour that its middle has."""
    middle = video[:, video.shape[1] // 2, video.shape[2] // 2].int()  # (T, 3)
    distance = (middle[:, None] - COLOURS.int()).abs().amax(-1)  # (T, colours)
    assert distance.amin(1).max() < 8
    return distance.argmin(1).tolist()


def noisy(count, height=32, width=48):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def write_otherwise(path, video, codec="libx264", rotation=0):
    """A video in another container or codec than ours."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        stream.set_display_rotation(rotation)
        for picture in video.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def clip(tmp_path):
    write_video(tmp_path / "a.mp4", coloured(12))
    return tmp_path / "a.mp4"


# ------------------------------------------------------------------------------ reading what was written

def test_a_video_comes_back_as_it_was_written(clip):
    video = read_video(clip)
    assert video.shape == (9, 32, 48, 3) and video.dtype == torch.uint8  # 12 frames, cut to 1 + 4 * 2
    assert (video.int() - coloured(9).int()).abs().max() < 8
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.codec_context.colorspace, stream.average_rate, stream.frames) == (1, 16, 12)
    assert clip.read_bytes().index(b"moov") < clip.read_bytes().index(b"mdat")  # a browser can start at once
    assert [path.name for path in clip.parent.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("rate, expected", [
    (16, [0, 1, 2, 3, 4, 5, 0, 1, 2]), (32, [0, 2, 4, 0, 2]), (8, [0, 0, 1, 1, 2, 2, 3, 3, 4]),
    (24, [0, 1, 3, 4, 0]), (30000 / 1001, [0, 1, 3, 5, 1])])
def test_at_each_time_the_frame_is_taken_that_is_shown_then(tmp_path, rate, expected):
    write_video(tmp_path / "a.mp4", coloured(12), fps=rate)
    frames = [which(read_video(tmp_path / "a.mp4", fps=16, frames=n)) for n in (1, 5, len(expected))]
    assert frames == [expected[:1], expected[:5], expected]


def test_rounded_timestamps_do_not_repeat_frames(tmp_path):
    write_otherwise(tmp_path / "a.mkv", coloured(6))  # an mkv stamps in milliseconds: 0, 63, 125, 188, ...
    assert which(read_video(tmp_path / "a.mkv")) == [0, 1, 2, 3, 4]


def test_the_clip_is_scaled_to_cover_the_size_and_cut_around_the_centre(tmp_path):
    video = torch.zeros(5, 64, 192, 3, dtype=torch.uint8)
    video[:, :, 64:128] = 255  # the middle third is white
    write_video(tmp_path / "a.mp4", video)
    assert read_video(tmp_path / "a.mp4", size=(32, 32)).float().mean() > 250
    wide = read_video(tmp_path / "a.mp4", size=(96, 16))[0].float().mean(-1)  # 96 x 32, and 16 rows of that
    assert wide[:, 36:60].min() > 240 and wide[:, :28].max() < 15 and wide[:, 68:].max() < 15
    upscaled = read_video(tmp_path / "a.mp4", size=(80, 160))
    assert upscaled.shape == (5, 160, 80, 3) and upscaled.float().mean() > 250


def test_a_video_that_was_filmed_upright_is_read_upright(tmp_path):
    video = torch.zeros(5, 32, 48, 3, dtype=torch.uint8)
    video[:, :, 24:] = 255
    write_otherwise(tmp_path / "a.mp4", video, rotation=90)  # turned counterclockwise: the right half is up
    upright = read_video(tmp_path / "a.mp4").float()
    assert upright.shape == (5, 48, 32, 3) and upright[:, :20].mean() > 240 and upright[:, 28:].mean() < 15


@pytest.mark.parametrize("codec, name, layout", [
    ("png", "50%d.png", "rgb24"), ("mjpeg", "a.jpg", "yuvj444p")])
def test_pictures_are_read(tmp_path, codec, name, layout):
    picture = coloured(1).clone()
    picture[:, :, 24:] = COLOURS[1]
    with open(tmp_path / name, "wb") as file, av.open(file, "w", format="image2pipe") as container:
        stream = container.add_stream(codec)
        stream.width, stream.height, stream.pix_fmt = 48, 32, layout
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture[0].numpy())))
        container.mux(stream.encode())
    image = read_image(tmp_path / name)
    assert image.shape == (3, 32, 48)
    assert (image[:, 5, 5] - to_tensor(picture)[:, 0, 5, 5]).abs().max() < 0.03
    assert (image[:, 5, 45] - to_tensor(picture)[:, 0, 5, 45]).abs().max() < 0.03
    assert read_image(tmp_path / name, (16, 16)).shape == (3, 16, 16)


# ------------------------------------------------------------------------------ what is refused

def refuse(path, message, **options):
    """Reading and checking the file raise the same InputError, which names it."""
    with pytest.raises(InputError, match=message) as error:
        read_video(path, **options)
    assert path.name in str(error.value)
    with pytest.raises(InputError) as other:
        check_video(path, **options)
    assert str(other.value) == str(error.value)


def test_files_that_were_cut_are_named(tmp_path):
    write_video(tmp_path / "noise.mp4", noisy(12))
    whole = (tmp_path / "noise.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:len(whole) * 2 // 3])
    refuse(tmp_path / "cut.mp4", "stops after|damaged")
    assert len(read_video(tmp_path / "cut.mp4", frames=1)) == 1  # the part that is needed is there
    check_video(tmp_path / "cut.mp4", frames=1)

    write_otherwise(tmp_path / "whole.avi", noisy(48, 128, 128), "mpeg4")
    whole = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "last.avi").write_bytes(whole[:len(whole) * 95 // 100])  # its header does not tell the length
    refuse(tmp_path / "last.avi", "damaged")


def test_a_file_with_a_hole_is_named(tmp_path):
    write_video(tmp_path / "noise.mp4", noisy(12))
    whole = (tmp_path / "noise.mp4").read_bytes()
    with av.open(str(tmp_path / "noise.mp4")) as container:
        position = [packet.pos for packet in container.demux(video=0)][6]
    (tmp_path / "hole.mp4").write_bytes(whole[:position] + bytes(400) + whole[position + 400:])
    refuse(tmp_path / "hole.mp4", "damaged")


def test_files_that_are_not_videos_are_named(tmp_path):
    (tmp_path / "text.mp4").write_text("words " * 99)
    (tmp_path / "empty.mp4").touch()
    write_sound(tmp_path / "sound.mp4")
    refuse(tmp_path / "text.mp4", "not a video")
    refuse(tmp_path / "empty.mp4", "not a video")
    refuse(tmp_path / "sound.mp4", "no video stream")
    refuse(tmp_path / "missing.mp4", "does not exist")


def test_short_clips_and_impossible_numbers_are_refused(clip, tmp_path):
    write_video(tmp_path / "short.mp4", coloured(3))
    refuse(tmp_path / "short.mp4", "3 frames at 16 fps and needs 5")
    refuse(clip, "12 frames at 16 fps and needs 81", frames=81)
    check_video(clip, frames=12)
    with pytest.raises(InputError, match="8 frames do not fit the VAE; ask for 1 \\+ 4n"):
        read_video(clip, frames=8)
    for fps in (0, -16, float("nan"), float("inf"), 1e-9, 1e9):
        with pytest.raises(InputError, match=f"{fps} frames per second are impossible"):
            read_video(clip, fps=fps)


def test_odd_sizes_are_refused(tmp_path):
    with pytest.raises(InputError, match="33x32 .*even"):
        write_video(tmp_path / "a.mp4", coloured(5, width=33))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ frames as numbers

def test_tensors_and_bytes_are_inverse():
    video = torch.arange(256, dtype=torch.uint8).reshape(4, 8, 8, 1).expand(4, 8, 8, 3)
    tensor = to_tensor(video)
    assert tensor.shape == (3, 4, 8, 8) and (tensor.min(), tensor.max()) == (-1, 1)
    assert torch.equal(to_uint8(tensor), video)
    assert to_uint8(torch.tensor([-1.7, 1.7]).view(1, 2, 1, 1)).flatten().tolist() == [0, 255]


def test_statistics_of_a_clip_by_hand():
    video = torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
    video[1] = 255                       # black, white, black
    contrast = (12 / 11 * (1 / 3 - 1 / 9)) ** 0.5
    expected = {"motion_energy": 1.0, "contrast": contrast, "saturation": 0.0}
    assert clip_statistics(video) == pytest.approx(expected)

    video = torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
    video[..., 0, 2] = 51                # a still picture, half of it blue
    found = clip_statistics(video)
    assert found["motion_energy"] == 0 and found["saturation"] == pytest.approx(0.1)
