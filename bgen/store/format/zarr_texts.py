"""Texts of any length in zarr, decoded within the memory that their bytes can explain.

A chunk of such texts begins with their number, and the decoder makes room for so many before it looks at one. A few
damaged bytes could ask for all of the memory. Here the number is compared with the bytes first: each text takes four
for its length, at least.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

HEADER = 4
"""Bytes of the number of texts, and of the length of each."""


@contextmanager
def bounded_texts() -> Iterator[None]:
    """Let zarr decode texts, and strings of bytes, with codecs that look at a chunk before they make room for it."""
    import zarr  # takes a second, which a store of bgen's does not need
    from numcodecs.registry import codec_registry

    version_2, version_3 = _codecs()
    before = {name: codec_registry[name] for name in version_2}
    codec_registry.update(version_2)
    try:
        with zarr.config.set({f"codecs.{name}": f"{kind.__module__}.{kind.__qualname__}" for name, kind in version_3}):
            yield
    finally:
        codec_registry.update(before)


def require_room(encoded: Any) -> None:
    """Check that a chunk of texts can hold as many as it says; ValueError if not."""
    stored = np.asarray(encoded).reshape(-1).view(np.uint8)
    if len(stored) >= HEADER:
        texts = int(stored[:HEADER].view("<u4")[0])
        if HEADER * (texts + 1) > len(stored):
            raise ValueError(f"a chunk of {len(stored):,} bytes says that it holds {texts:,} texts")


@functools.cache
def _codecs() -> tuple[dict[str, type], list[tuple[str, type]]]:
    """Make the codecs of both versions of zarr, by name; those of version 3 stand beside zarr's own."""
    from numcodecs.vlen import VLenBytes, VLenUTF8
    from zarr.codecs import VLenBytesCodec, VLenUTF8Codec
    from zarr.registry import register_codec

    def of_version_2(plain: type[Any]) -> type:
        def decode(self: Any, buf: Any, out: Any = None) -> Any:
            require_room(buf)
            return plain.decode(self, buf, out)

        return type(plain.__name__, (plain,), {"decode": decode, "__module__": __name__})

    def of_version_3(plain: type[Any]) -> type:
        def _decode_sync(self: Any, chunk_bytes: Any, chunk_spec: Any) -> Any:
            require_room(chunk_bytes.as_array_like())
            return plain._decode_sync(self, chunk_bytes, chunk_spec)

        async def _decode_single(self: Any, chunk_bytes: Any, chunk_spec: Any) -> Any:
            require_room(chunk_bytes.as_array_like())
            return await plain._decode_single(self, chunk_bytes, chunk_spec)

        # Zarr knows the codec of texts by the name of its class.
        members = {"_decode_sync": _decode_sync, "_decode_single": _decode_single, "__module__": __name__}
        return type(plain.__name__, (plain,), members)

    version_3 = [("vlen-utf8", of_version_3(VLenUTF8Codec)), ("vlen-bytes", of_version_3(VLenBytesCodec))]
    for name, codec in version_3:
        register_codec(name, codec)
    return {"vlen-utf8": of_version_2(VLenUTF8), "vlen-bytes": of_version_2(VLenBytes)}, version_3
