"""Whether the folders that a user named can hold what is to be kept there, asked before anything starts."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core.environment import HOME
from pipelines.core.errors import ThroughlineError

if TYPE_CHECKING:
    from orchestration.profiles.profile import Profile


class UnusableFolder(ThroughlineError):
    """A folder that can't hold what is to be kept there: what was found, and the words that name another."""

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(f"{what}; name another with: {mend}")
        self.what, self.mend = what, mend


def refuse_unusable(folder: Path, name: str, mend: str, *, to_write: bool = False) -> None:
    """Raise UnusableFolder where a file stands in a folder's place or path, or, `to_write`, it may not be written.

    `name` is what the user knows the folder as, `mend` what names another. A folder that is not there yet is fine.
    """
    nearest = folder.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        found = "a file" if nearest == folder.absolute() else f"the file {nearest} in its path"
        if nearest.is_symlink() and not nearest.exists():
            found = f"the link {nearest} to nothing"
        raise UnusableFolder(f"{name} {folder}: expected a folder, found {found}", mend)
    if to_write and not os.access(nearest, os.W_OK | os.X_OK):
        raise UnusableFolder(f"{name} {folder}: expected a folder to write to, found no permission for {nearest}", mend)


def refuse_unusable_home(home: Path, *, to_write: bool = False) -> None:
    """Raise UnusableFolder where outputs, logs and history can't lie under a home."""
    refuse_unusable(home, HOME, f"export {HOME}=/a/folder", to_write=to_write)


def refuse_unusable_root(profile: "Profile", *, to_write: bool = False) -> None:
    """Raise UnusableFolder where the output root can't be a folder."""
    refuse_unusable(profile.output_root, "output root", "--output-root /a/folder", to_write=to_write)


def usable_root(profile: "Profile") -> Path:
    """Return the folder of outputs, opened; raises UnusableFolder where it or the profile's home can't be one."""
    refuse_unusable_home(Path(profile.home))
    refuse_unusable_root(profile)
    return profile.open_output_root()
