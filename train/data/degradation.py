"""The degradations of AIM 2022: bicubic /4 and JPEG quality 10 by Pillow, HEVC QP 37 by libx265.

Pillow itself is the definition of Track 1: its bicubic is antialiased with 8-bit arithmetic, which
no floating-point resize equals to the bit. Decoded JPEGs differ by a few levels between builds of
libjpeg; compare them with a tolerance, never by hash. Track 2 was coded with HM 16.20
(`encoder_lowdelay_P_main`, QP 37), which no package index has: libx265 through PyAV stands for it.
"""

from __future__ import annotations

import fractions
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

JPEG_QUALITY, HEVC_QP, SCALE = 10, 37, 4
X265 = (
    "qp={qp}:ipratio=1.0:pbratio=1.0:bframes=0:keyint=-1"
    ":log-level=none:info=0:pools=none:frame-threads=1:ctu={ctu}"
)


def modcrop(image: np.ndarray, scale: int = SCALE) -> np.ndarray:
    """[H, W, ...] without its last rows and columns, so that sides are multiples of `scale`."""
    height, width = image.shape[:2]
    return image[: height - height % scale, : width - width % scale]


def check_multiple(image: np.ndarray, scale: int, what: str) -> None:
    """Raises ValueError where sides are no multiples of `scale`."""
    height, width = image.shape[:2]
    if height % scale or width % scale or not height or not width:
        raise ValueError(
            f"{what}: a {height}x{width} image is no multiple of scale {scale}; crop it with "
            "modcrop (data.options.modcrop=True)"
        )


def downsample(image: np.ndarray, scale: int = SCALE, what: str = "image") -> np.ndarray:
    """Pillow's antialiased bicubic of uint8 [H, W, 3] or [H, W] by 1 / scale."""
    check_multiple(image, scale, what)
    height, width = image.shape[:2]
    size = (width // scale, height // scale)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def upsample(image: np.ndarray, scale: int = SCALE) -> np.ndarray:
    """Pillow's bicubic of uint8 [h, w, 3] by `scale`: the baseline every entry must beat."""
    height, width = image.shape[:2]
    size = (width * scale, height * scale)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def jpeg_bytes(image: np.ndarray, quality: int = JPEG_QUALITY) -> bytes:
    """JPEG of uint8 [H, W, 3] (or [H, W]): Pillow's defaults, so 4:2:0 and standard tables."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return file.getvalue()


def jpeg(image: np.ndarray, quality: int = JPEG_QUALITY) -> np.ndarray:
    """uint8 [H, W, 3] through JPEG and back."""
    with Image.open(io.BytesIO(jpeg_bytes(image, quality))) as decoded:
        return np.asarray(decoded.convert("L" if image.ndim == 2 else "RGB"))


def quantization_tables(encoded: bytes) -> list[np.ndarray]:
    """The quantization tables int64 [64] of a JPEG, luma first, as Pillow orders them."""
    with Image.open(io.BytesIO(encoded)) as image:
        return [np.asarray(image.quantization[k], np.int64) for k in sorted(image.quantization)]


def degrade_image(
    image: np.ndarray, scale: int = SCALE, quality: int = JPEG_QUALITY, what: str = "image"
) -> np.ndarray:
    """Track 1: bicubic / scale, then JPEG; uint8 [H, W, 3] -> [H / s, W / s, 3].

    Quality 0 is no JPEG: classical super-resolution.
    """
    small = downsample(image, scale, what) if scale > 1 else image
    return jpeg(small, quality) if quality else small


def _av():
    try:
        import av
    except ImportError:
        raise ImportError(
            "video degradation needs PyAV with libx265: install the extra `video` "
            "(pip install 'jaxmodels[video]')"
        ) from None
    return av


def encode_hevc(frames: Sequence[np.ndarray], qp: int = HEVC_QP, rate: int = 30) -> list[bytes]:
    """HEVC packets of RGB frames uint8 [h, w, 3], constant QP, P frames only after the first.

    `ipratio=1`: without it libx265 would lower the QP of the I frame by about 3.
    """
    return _encode([_video_frame(frame) for frame in frames], qp, rate)


def _video_frame(frame: np.ndarray):
    return _av().VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")


def _encode(frames, qp: int, rate: int) -> list[bytes]:
    av = _av()
    packets, context = [], av.CodecContext.create("libx265", "w")
    context.width, context.height = frames[0].width, frames[0].height
    context.pix_fmt = "yuv420p"
    context.framerate = rate
    context.time_base = fractions.Fraction(1, rate)
    # A picture one block wide makes libx265 read memory that it never wrote, and two runs differ.
    side = min(context.width, context.height)
    ctu = next((size for size in (64, 32) if 2 * size <= side), 16)
    context.options = {"x265-params": X265.format(qp=qp, ctu=ctu)}
    for number, frame in enumerate(frames):
        frame = frame.reformat(format="yuv420p")
        frame.pts, frame.time_base = number, context.time_base
        packets += [bytes(packet) for packet in context.encode(frame)]
    packets += [bytes(packet) for packet in context.encode(None)]
    return packets


def decode_hevc(packets: Sequence[bytes]) -> np.ndarray:
    """RGB frames uint8 [T, h, w, 3] of HEVC packets."""
    av = _av()
    context = av.CodecContext.create("hevc", "r")
    context.thread_count = 1
    frames = []
    for packet in [*map(av.Packet, packets), None]:
        frames += context.decode(packet)
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def degrade_video(frames: np.ndarray, scale: int = SCALE, qp: int = HEVC_QP) -> np.ndarray:
    """Track 2: bicubic / scale in yuv420p (swscale), then HEVC at a fixed QP.

    frames uint8 [T, H, W, 3] -> [T, H / s, W / s, 3]; sides multiples of 2 * scale.

    Raises ImportError naming the extra when PyAV is missing; never another codec.
    """
    av = _av()
    height, width = frames.shape[1:3]
    check_multiple(frames[0], 2 * scale, "video frame")
    small = []
    for frame in frames:
        yuv = _video_frame(frame).reformat(format="yuv420p")
        small.append(
            yuv.reformat(
                width=width // scale,
                height=height // scale,
                interpolation=av.video.reformatter.Interpolation.BICUBIC,
            )
        )
    return decode_hevc(_encode(small, qp, 30))


def read_video_file(path) -> np.ndarray:
    """All frames of a video file, uint8 [T, H, W, 3].

    Raises ImportError naming the extra without PyAV, ValueError for a file that is no video.
    """
    av = _av()
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: not a readable video ({error})") from None
    if not frames:
        raise ValueError(f"{path}: no frames")
    return np.stack(frames)
