"""Every error that lavatar raises on purpose.

    LavatarError                    exit code 1
    ├── UsageError                  exit code 2: the command, a name, a key or the path of a file is wrong
    │   ├── ConfigError             unknown recipe, unknown key, value out of range
    │   │   └── PlacementError      a stage asks for more than the cluster can ever give
    │   ├── NameError_              a subject's name that cannot be one, or is taken
    │   └── UnknownSubjectError     no subject of that name
    ├── DataError                   what was read cannot be used
    │   ├── VideoError              not a video, empty, truncated, too short; in a job: gone
    │   ├── FaceError               no face, two faces, face lost for too long
    │   └── ShardError              a damaged tar, sample or manifest
    ├── WeightsError                a pretrained file is missing or is not what it should be
    ├── StorageError                disk full, folder not writable
    ├── TrainingError               a loss that is not finite, a worker that cannot go on
    │   ├── CheckpointError         no usable checkpoint where one is needed
    │   └── OutOfMemoryError        a batch that does not fit into the memory there is
    ├── JobError                    job and stage bookkeeping
    │   ├── UnknownJobError         no job of that id
    │   ├── StageBusyError          another process owns the stage
    │   └── StageFailedError        a stage of the job failed
    ├── SlowerError                 a measured speed is worse than its baseline
    └── Interrupted                 exit code 130: Ctrl-C or a signal; what was done is kept
        └── Cancelled               somebody cancelled the job

Each carries `message` (what happened, the value got, the value wanted) and `hint` (what to do next). They are caught
once, in `lavatar.platform.cli`.
"""

from __future__ import annotations

from lavatar.masking import masked

UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What a JSON file that came from elsewhere, or was damaged, raises while it is read and taken apart."""


class LavatarError(Exception):
    """Root of the tree. `message` says what happened, `hint` what to do next; both are shown to the user."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        message, hint = masked(message), masked(hint)  # both are shown, logged and stored: no secret gets into them
        super().__init__(message, hint)  # both in args, so that the error survives pickling between processes
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(LavatarError):
    """The command line, a name or a configuration key is wrong; nothing was started.

    A path that leads to no file, to a folder or to a file that may not be read is wrong in this sense, whichever
    command it was given to. What is wrong in a file that can be read is a DataError.
    """

    exit_code = 2


class ConfigError(UsageError):
    """Unknown recipe, unknown key or a value out of range."""


class PlacementError(ConfigError):
    """A stage asks for more than the cluster can ever give; nothing was started."""


class NameError_(UsageError):
    """A subject's name that cannot be one, or that another video already has."""


class UnknownSubjectError(UsageError):
    """No subject of that name is registered."""


class DataError(LavatarError):
    """Something that was read cannot be used."""


class VideoError(DataError):
    """Not a video, empty, truncated or too short."""


class FaceError(DataError):
    """No face, more than one face, or a face lost for too long."""


class ShardError(DataError):
    """A damaged tar, sample or manifest; the message names shard and key."""


class ObjectError(DataError):
    """An object of the store is damaged or missing; the message names it."""


class WeightsError(LavatarError):
    """A pretrained file is missing or has another checksum; the hint is the command that gets it."""


class StorageError(LavatarError):
    """Disk full or a folder that cannot be written."""


class TrainingError(LavatarError):
    """A loss that is not finite, or a worker that cannot go on."""


class CheckpointError(TrainingError):
    """No usable checkpoint where one is needed."""


class OutOfMemoryError(TrainingError):
    """The memory of the machine or of its GPU is too small for the batch."""


class JobError(LavatarError):
    """Bookkeeping of jobs and stages."""


class UnknownJobError(JobError):
    """No job of that id."""

    exit_code = 2


class StageBusyError(JobError):
    """Another live process owns the stage."""


class StageFailedError(JobError):
    """A stage failed; the message carries the cause."""


class SlowerError(LavatarError):
    """A measured speed is worse than its baseline."""


class Interrupted(LavatarError):
    """Ctrl-C, a signal or a cancel. What was finished is kept and a repeated submit goes on from there."""

    exit_code = 130


class Cancelled(Interrupted):
    """Somebody asked the job to stop. What was finished is kept."""
