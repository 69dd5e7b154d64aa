"""What can go wrong, as one line for a person and one exit code for a script.

Every error a user can cause or meet is a `KanthaError`: its message names the cause and the next step, and the command
line prints it without a traceback and exits with `exit_code`. docs/exit-codes.md has a section for each code; a test
keeps the two in step.

    KanthaError
    ├── SpecError               10  a run spec that cannot be used
    ├── RunDirectoryError       11  a run directory that is missing, damaged or of the wrong kind
    ├── NewerRunError           12  a run directory written by a newer Kantha
    ├── CorpusError             13  a text source that cannot be read
    ├── MissingPackageError     14  an optional package that this command needs
    ├── PortTakenError          15  a port that another program holds
    ├── StorageError            16  a disk that is full or refuses to be written
    ├── TokenizerError          17  a tokenizer file that cannot be used
    ├── DeviceMemoryError       18  a GPU on which not even one example fits
    ├── UnreachableError        20  nobody answers at the run's address
    ├── NotACoordinatorError    21  something answers, but it is not a Kantha coordinator
    ├── FingerprintError        22  the run spec that arrived is not the one that was announced
    ├── DigestError             23  a downloaded file (tokenizer, snapshot) is not the one that was announced
    ├── MembershipError         24  the coordinator did not let this volunteer in
    ├── SwarmError              25  the peer-to-peer swarm could not be joined, or was lost
    ├── PlatformError           26  this machine cannot take part
    ├── ProcessEndedError       27  a process that this program started ended again and again
    ├── PublishingError         28  the model could not be put on the Hugging Face hub
    ├── OrderError              29  an order of the organizer that cannot be given, or is not genuine
    ├── DemoError               30  the demo ran, but a part of it failed
    ├── LeaseError              31  this member's place on this service is taken by another instance
    ├── SignInError             32  nobody signed in for this machine, or not in a way that can be used
    └── VerificationError       33  a certificate of contribution that does not hold
"""


def printable(text: object, most: int = 500) -> str:
    """What a stranger sent, as one line that is safe to show: control and formatting characters become "?"."""
    joiners = "\u200c\u200d"  # Bengali is written with them
    return "".join(c if c.isprintable() or c in joiners else "?" for c in str(text)[:most])


class KanthaError(Exception):
    """Base of all errors meant for a person; the message is one line: cause, place, next step."""

    exit_code = 1


class SpecError(KanthaError):
    """A run spec that cannot be used; `problems` has one line per mistake, each with its path in the file."""

    exit_code = 10

    def __init__(self, source: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


class RunDirectoryError(KanthaError):
    exit_code = 11


class NewerRunError(RunDirectoryError):
    exit_code = 12


class CorpusError(KanthaError):
    exit_code = 13


class MissingPackageError(KanthaError):
    exit_code = 14


class PortTakenError(KanthaError):
    exit_code = 15


class StorageError(KanthaError):
    exit_code = 16


class TokenizerError(KanthaError):
    exit_code = 17


class DeviceMemoryError(KanthaError):
    exit_code = 18


class UnreachableError(KanthaError):
    exit_code = 20


class NotACoordinatorError(KanthaError):
    exit_code = 21


class FingerprintError(KanthaError):
    exit_code = 22


class DigestError(KanthaError):
    exit_code = 23


class MembershipError(KanthaError):
    exit_code = 24


class SwarmError(KanthaError):
    exit_code = 25


class PlatformError(KanthaError):
    exit_code = 26


class ProcessEndedError(KanthaError):
    exit_code = 27


class PublishingError(KanthaError):
    exit_code = 28


class OrderError(KanthaError):
    exit_code = 29


class DemoError(KanthaError):
    exit_code = 30


class LeaseError(KanthaError):
    exit_code = 31


class SignInError(KanthaError):
    exit_code = 32


class VerificationError(KanthaError):
    exit_code = 33
