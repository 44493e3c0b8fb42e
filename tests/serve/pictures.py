"""Small pictures as bytes and data URLs."""

import base64
import io
from typing import Any

from PIL import Image


def picture_bytes(width: int = 8, height: int = 6, kind: str = "PNG", **save: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 40, 40)).save(buffer, kind, **save)
    return buffer.getvalue()


def data_url(image_bytes: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(image_bytes).decode()}"
