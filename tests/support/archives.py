"""Makes archives of several files, as someone else may have made them."""

import io
import tarfile
import zipfile
from pathlib import Path


def tar(outside: Path | None = None, form: int = tarfile.PAX_FORMAT) -> bytes:
    """Returns a tar archive. With `outside`, links in it lead to this path, which unpacking would write."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=form) as archive:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        add("a.txt", b"text\nhello\n")
        if outside is not None:
            link = tarfile.TarInfo("s")
            link.type, link.linkname = tarfile.SYMTYPE, "."
            archive.addfile(link)
            add("s/" * 30 + "../" * 30 + str(outside).lstrip("/"), b"planted")
    return packed.getvalue()


def zipped(*names: str, after: bytes = b"") -> bytes:
    """Returns a zip archive, which programs tell by its end if there is something before it."""
    packed = io.BytesIO(after)
    with zipfile.ZipFile(packed, "a") as archive:
        for name in names:
            archive.writestr(name, '{"text": "hello"}\n')
    return packed.getvalue()
