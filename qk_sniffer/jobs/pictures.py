"""Draws the pictures of a finished dataset at the end of its job, if matplotlib is installed.

A dataset is whole without them: whatever goes wrong is logged, and the job goes on.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.drawing.draw import MATPLOTLIB_MISSING, can_draw, draw, folder_of, undrawn
from qk_sniffer.logs import logger
from qk_sniffer.store.files import Folder
from qk_sniffer.store.layout import PICTURE_SUFFIXES, Layout
from qk_sniffer.store.locks import TakenAwayError
from qk_sniffer.store.open_folder import Access
from qk_sniffer.store.same_dataset import replaced, same_dataset
from qk_sniffer.text import say

log = logger(__name__)


def draw_pictures(layout: Layout, access: Access, manifest: Mapping[str, Any]) -> None:
    """Draws the pictures that are missing from the dataset of `manifest` in the data root.

    `access` is the way to it. Its check raises an error if another dataset is there now.

    Raises:
        TakenAwayError: from the check.
    """
    try:
        dataset = Dataset(Folder(layout.root))
        if dataset.manifest != manifest:  # it may be swapped back before the pictures are written
            raise replaced(layout.root)
        missing = undrawn(dataset)
        if not missing:
            return
        if not can_draw():
            log.warning("no pictures: %s", MATPLOTLIB_MISSING)
            return
        names = draw(missing, folder_of(dataset), access=access, held=partial(same_dataset, layout, manifest, access))
    except TakenAwayError:
        raise
    except Exception as error:  # any error of matplotlib, too
        log.warning("no pictures: %s", error)
        return
    if names:
        say(f"Pictures: {folder_of(dataset)}/{', '.join(names)} ({', '.join(PICTURE_SUFFIXES)})")
