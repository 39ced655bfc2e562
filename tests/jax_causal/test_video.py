"""Video files: what comes back is what went in, and no half file ever stands under a final name."""

import contextlib
import errno
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from jax_causal import video
from jax_causal.video import Video, VideoWriter, check_output, read_image, read_video

ROOT = Path(__file__).parents[2]


def moving_waves(num_frames=20, height=64, width=96):
    """Smooth moving colours, which video codecs keep well: uint8 [T, H, W, 3]."""
    t, y, x, c = np.ogrid[:num_frames, :height, :width, :3]
    return (128 + 90 * np.sin((x + 3 * t) / 20 + c) * np.cos((y - 2 * t) / 15)).astype(np.uint8)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB."""
    return 10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2))


@pytest.mark.parametrize(("suffix", "floor"), [(".mp4", 38), (".gif", 36)])
def test_round_trip(tmp_path, suffix, floor):
    frames = moving_waves()
    path = Video(frames, fps=16).save(tmp_path / f"waves{suffix}")
    assert path == tmp_path / f"waves{suffix}"
    back, fps = read_video(path)
    assert back.shape == frames.shape
    assert back.dtype == np.uint8
    assert psnr(back, frames) > floor
    assert psnr(back[1:], frames[:-1]) < floor - 6, "the frames must come back in order"
    assert fps == pytest.approx(16, rel=0.01)


@pytest.mark.parametrize(("suffix", "floor"), [(".mp4", 38), (".gif", 36)])
def test_written_in_chunks(tmp_path, suffix, floor):
    frames = moving_waves()
    with VideoWriter(tmp_path / f"waves{suffix}", fps=16) as writer:
        for chunk in (frames[:1], frames[1:1], frames[1:13], frames[13:]):
            writer.write(chunk)
    back, _ = read_video(tmp_path / f"waves{suffix}")
    assert back.shape == frames.shape
    assert psnr(back, frames) > floor


def test_mp4_colours(tmp_path):
    """The colour matrix is named in the file, and plain colours come back through it."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 120, 40]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (4, 32, 48, 3))
    path = Video(frames, fps=16).save(tmp_path / "colours.mp4")
    assert np.abs(read_video(path)[0].astype(int) - frames).max() <= 4
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).colorspace == av.video.reformatter.Colorspace.SMPTE170M


@pytest.mark.parametrize("fps", [16, 24, 23.976])
def test_frame_rate(tmp_path, fps):
    path = Video(moving_waves(5), fps=fps).save(tmp_path / "waves.mp4")
    assert read_video(path)[1] == pytest.approx(fps, rel=1e-6)


def test_gif_keeps_pace_though_it_counts_in_hundredths(tmp_path):
    path = Video(moving_waves(32), fps=16).save(tmp_path / "waves.gif")
    with Image.open(path) as gif:
        durations = []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
    assert sum(durations) == 2000
    assert set(durations) == {60, 70}


def test_numpy_files_keep_every_bit(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 7, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.load(Video(frames, 16).save(tmp_path / "a.npy")), frames)
    with np.load(Video(frames, 16).save(tmp_path / "a.npz")) as file:
        np.testing.assert_array_equal(file["frames"], frames)
        assert file["fps"] == 16


def test_numbered_png_files(tmp_path):
    frames = moving_waves(12)
    Video(frames, 16).save(tmp_path / "f%05d.png")
    assert sorted(os.listdir(tmp_path)) == [f"f{i:05}.png" for i in range(12)]
    for i, frame in enumerate(frames):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"f{i:05}.png")), frame)


@pytest.mark.parametrize(
    ("num_frames", "picks", "columns"),
    [(3, [0, 1, 2], 3), (8, range(8), 6), (24, range(24), 6), (70, range(0, 70, 3), 6)],
)
def test_contact_sheet(tmp_path, num_frames, picks, columns):
    frames = np.empty((num_frames, 4, 6, 3), np.uint8)
    frames[:] = np.arange(1, num_frames + 1)[:, None, None, None]
    sheet = np.asarray(Image.open(Video(frames, 16).save(tmp_path / "sheet.png")))
    corners = sheet[::4, ::6, 0]
    assert sheet.shape == (4 * corners.shape[0], 6 * columns, 3)
    cells = corners.ravel()[: len(picks)]
    assert cells.tolist() == [frames[i, 0, 0, 0] for i in picks]
    assert not corners.ravel()[len(picks) :].any()


def test_notebook_player():
    html = Video(moving_waves(4), 16)._repr_html_()
    assert re.match(r'<video [^>]*autoplay loop muted.* src="data:video/mp4;base64,AAAA', html)
    assert "no frames" in Video(None, 16)._repr_html_()


def test_a_process_without_frames_writes_nothing(tmp_path):
    """Every process of a multi-host run makes the same calls; one of them holds the frames."""
    for name in ("a.mp4", "a.npy", "%d.png"):
        assert Video(None, 16).save(tmp_path / name) == tmp_path / name
    with VideoWriter(tmp_path / "b.mp4", 16) as writer:
        writer.write(np.zeros((0, 64, 96, 3), np.uint8))
    assert not os.listdir(tmp_path)


# No half files.


def write_then(action, path, **options):
    """Writes some frames and, before the file is finished, does something else."""
    with VideoWriter(path, 16, **options) as writer:
        writer.write(moving_waves(5))
        action(writer)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_interrupted_writing_leaves_nothing(tmp_path, name, error):
    def interrupt(_):
        assert not (tmp_path / name).exists(), "the final name must wait for the end"
        raise error

    with pytest.raises(error):
        write_then(interrupt, tmp_path / name)
    assert not os.listdir(tmp_path)


def test_interrupted_overwriting_keeps_the_old_file(tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_then(interrupt, tmp_path / "a.mp4", overwrite=True)
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"old"


def test_killed_writing_leaves_only_a_hidden_file(tmp_path):
    script = """
import sys, time
import numpy as np
from jax_causal.video import VideoWriter
with VideoWriter(sys.argv[1], 16) as writer:
    writer.write(np.random.default_rng(0).integers(0, 256, (40, 96, 128, 3), dtype=np.uint8))
    print("written", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "a.mp4")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".a.mp4.")
    assert left.endswith(".tmp")
    Video(moving_waves(3), 16).save(tmp_path / "a.mp4")  # and the next run is not in its way


class FullDisk(io.FileIO):
    """A file on a disk with little room left."""

    room = 20_000

    def write(self, data):
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.npy", "a.npz", "a.png"])
def test_full_disk(tmp_path, monkeypatch, name):
    monkeypatch.setattr(video, "open", FullDisk, raising=False)
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8)
    with pytest.raises(OSError, match=f"disk is full.*{name}") as caught:
        Video(noise, 16).save(tmp_path / name)
    assert caught.value.errno == errno.ENOSPC
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_disk_full_at_the_end(tmp_path, monkeypatch, name):
    """What is written only on closing, like the index of an mp4, may not fit either."""
    monkeypatch.setattr(video, "open", FullDisk, raising=False)
    with pytest.raises(OSError, match="disk is full"):
        write_then(lambda _: monkeypatch.setattr(FullDisk, "room", 0), tmp_path / name)
    assert not os.listdir(tmp_path)


def test_an_interrupt_is_not_hidden_by_the_full_disk_it_meets(tmp_path, monkeypatch):
    def interrupt(_):
        monkeypatch.setattr(FullDisk, "room", 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "open", FullDisk, raising=False)
    with pytest.raises(KeyboardInterrupt):
        write_then(interrupt, tmp_path / "a.mp4")
    assert not os.listdir(tmp_path)


# Errors that name the mend.


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.npy", "a.png"])
def test_existing_output(tmp_path, name):
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(FileExistsError, match=r"--overwrite .*overwrite=True"):
        Video(moving_waves(3), 16).save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"old"
    Video(moving_waves(3), 16).save(tmp_path / name, overwrite=True)
    assert (tmp_path / name).read_bytes() != b"old"
    assert os.listdir(tmp_path) == [name]


def test_existing_numbered_output(tmp_path):
    for other in ("sheet.png", "f1.jpg", "gf1.png"):
        (tmp_path / other).touch()
    assert check_output(tmp_path / "f%03d.png") == tmp_path / "f%03d.png"
    (tmp_path / "f007.png").touch()
    with pytest.raises(FileExistsError, match=r"f007\.png exists"):
        check_output(tmp_path / "f%03d.png")
    assert check_output(tmp_path / "f%03d.png", overwrite=True)


@pytest.mark.parametrize("name", ["a.avi", "a", "frames%05d.jpg"])
def test_unknown_suffix(tmp_path, name):
    with pytest.raises(ValueError, match=r"\.mp4, \.gif, \.npy, \.npz, \.png, or in %05d\.png"):
        Video(moving_waves(3), 16).save(tmp_path / name)


def test_only_players_formats_are_streamed(tmp_path):
    with pytest.raises(ValueError, match=r"use \.mp4 or \.gif"):
        VideoWriter(tmp_path / "a.npy", 16)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        VideoWriter(tmp_path / "nowhere" / "a.mp4", 16)


@contextlib.contextmanager
def ordinary_user():
    """Root may write anywhere, so a test run by root steps down."""
    if os.getuid() != 0:
        yield
        return
    os.setreuid(65534, -1)
    try:
        yield
    finally:
        os.setreuid(0, -1)


def test_unwritable_folder():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        with ordinary_user(), pytest.raises(PermissionError, match="cannot be written to"):
            VideoWriter(Path(folder) / "a.mp4", 16)


@pytest.mark.parametrize("size", [(63, 96), (64, 95)])
def test_odd_sizes(tmp_path, size):
    frames = moving_waves(3, *size)
    with pytest.raises(ValueError, match=f"even height and width, not {size[0]} x {size[1]}"):
        Video(frames, 16).save(tmp_path / "a.mp4")
    assert not os.listdir(tmp_path)
    assert read_video(Video(frames, 16).save(tmp_path / "a.gif"))[0].shape == frames.shape


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 64, 96, 3), np.float32),
        np.zeros((64, 96, 3), np.uint8),
        np.zeros((2, 3, 64, 96), np.uint8),
    ],
)
def test_frames_of_another_kind(tmp_path, frames):
    with pytest.raises(ValueError, match=r"uint8 \[t, H, W, 3\], not"):
        Video(frames, 16).save(tmp_path / "a.mp4")


def test_size_changes_midway(tmp_path):
    with pytest.raises(ValueError, match=r"\[32, 96\], but those before them are \[64, 96\]"):
        write_then(lambda writer: writer.write(moving_waves(3, 32)), tmp_path / "a.mp4")
    assert not os.listdir(tmp_path)


# Reading.


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_read_image_is_not_cropped(tmp_path, mode):
    halves = np.zeros((40, 100, 3), np.uint8)
    halves[:, 50:] = 255
    Image.fromarray(halves).convert(mode).save(tmp_path / "halves.png")
    image = read_image(tmp_path / "halves.png", height=48, width=32)
    assert image.shape == (48, 32, 3)
    assert image.dtype == np.uint8
    assert (image[:, :14] <= 2).all()
    assert (image[:, 18:] >= 253).all()


def test_read_image_stands_upright(tmp_path):
    """Phones store pictures as the sensor saw them, and a tag that says which way is up."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[:, :20] = 255  # the left becomes the top
    Image.fromarray(picture).save(tmp_path / "phone.png", exif=exif)
    image = read_image(tmp_path / "phone.png", 40, 40)
    assert (image[:18] == 255).all()
    assert (image[22:] == 0).all()


def test_read_image_filters_out_aliasing(tmp_path):
    stripes = np.zeros((8, 800, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    inside = read_image(tmp_path / "stripes.png", 8, 80)[:, 2:-2]
    assert np.abs(inside.astype(int) - 128).max() <= 2


def test_read_video_stops_early(tmp_path):
    frames = moving_waves(12)
    path = Video(frames, 16).save(tmp_path / "waves.mp4")
    np.testing.assert_array_equal(read_video(path, 5)[0], read_video(path)[0][:5])
    with pytest.raises(ValueError, match="12 frames, but 13 are needed"):
        read_video(path, 13)


@pytest.mark.parametrize("kind", ["video", "image"])
def test_missing_and_damaged_files(tmp_path, kind):
    def read(path):
        return read_video(path) if kind == "video" else read_image(path, 8, 8)

    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.mp4"):
        read(tmp_path / "nowhere.mp4")
    with pytest.raises(FileNotFoundError):
        read(tmp_path)
    whole = Video(moving_waves(), 16).save(tmp_path / ("a.mp4" if kind == "video" else "a.png")).read_bytes()
    for damaged in (b"", b"not a video", whole[: len(whole) // 2]):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ValueError, match=f"damaged is not a readable {kind}"):
            read(tmp_path / "damaged")


def test_to_model_range():
    pixels = np.array([0, 51, 204, 255], np.uint8)
    values = video.to_model_range(pixels)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, [-1, -0.6, 0.6, 1], atol=1e-6)
