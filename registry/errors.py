"""Failures that only a catalogue can have; the tree's root and the rest are in composer/errors.py.

NotFoundError
├── BaseNotFoundError          no base of that name or fingerprint
├── AdapterNotFoundError       no adapter of that name
├── VersionNotFoundError       the adapter has no such version, alias or digest
├── RepositoryNotFoundError    no repository of that name
├── RevisionNotFoundError      the repository has no such branch, tag or commit
├── EntryNotFoundError         the revision has no such file
└── JobNotFoundError
ConflictError
├── VersionTakenError          other bytes hold that version
├── NameTakenError             another base or an adapter holds that name
├── ConfusableNameError        a new namespace that could be taken for another one
├── RepositoryExistsError      a repository has that name
├── RefExistsError             the repository has that branch or tag
├── StaleParentError           somebody else has committed since
├── DependentsError            something that is in use is to be removed
└── CollectedError             stored bytes were removed before anything named them
TypedError
└── HubUnreachableError        the hub of an import does not answer as one
PolicyError
├── AuthenticationError        no token, or one that is not valid
├── ForbiddenError             a token that is not good for this
├── RateLimitError             too many requests
├── YankedError                a version that was withdrawn, by its name
├── QuarantinedError           bytes that nobody may use
├── LicenceConflictError       licences that cannot both be kept
├── QueueFullError             too many jobs wait
└── DiskLimitError             a composition would take more of the disk than is allowed
IntegrityError
├── BaseChangedError           a base's files are no longer what was fingerprinted
├── BlobCorruptError           a stored file no longer has its digest
├── CompositionChangedError    a composed model is no longer what composition.json records, or never was
└── SignatureError             a signature that is not by that key, or of other files
"""

from __future__ import annotations

from composer.errors import ConflictError, IntegrityError, NotFoundError, PolicyError, TypedError

__all__ = [
    "AdapterNotFoundError",
    "AuthenticationError",
    "BaseChangedError",
    "BaseNotFoundError",
    "BlobCorruptError",
    "CollectedError",
    "CompositionChangedError",
    "ConfusableNameError",
    "DependentsError",
    "DiskLimitError",
    "EntryNotFoundError",
    "ForbiddenError",
    "HubUnreachableError",
    "JobNotFoundError",
    "LicenceConflictError",
    "NameTakenError",
    "QuarantinedError",
    "QueueFullError",
    "RateLimitError",
    "RefExistsError",
    "RepositoryExistsError",
    "RepositoryNotFoundError",
    "RevisionNotFoundError",
    "SignatureError",
    "StaleParentError",
    "VersionNotFoundError",
    "VersionTakenError",
    "YankedError",
]


class BaseNotFoundError(NotFoundError):
    """No base of that name or fingerprint."""

    code = "base-not-found"


class AdapterNotFoundError(NotFoundError):
    """No adapter of that name."""

    code = "adapter-not-found"


class VersionNotFoundError(NotFoundError):
    """The adapter has no such version, alias or digest."""

    code = "version-not-found"


class JobNotFoundError(NotFoundError):
    """No job of that id."""

    code = "job-not-found"


class VersionTakenError(ConflictError):
    """Other bytes hold that version."""

    code = "version-taken"


class NameTakenError(ConflictError):
    """Another base or an adapter holds that name."""

    code = "name-taken"


class ConfusableNameError(ConflictError):
    """A new namespace has the skeleton of one that belongs to others (registry.confusables)."""

    code = "confusable-name"


class DependentsError(ConflictError):
    """Something that is in use is to be removed; `fields['dependents']` lists what uses it."""

    code = "in-use"


class CollectedError(ConflictError):
    """Stored bytes were removed before anything named them."""

    code = "collected"


class YankedError(PolicyError):
    """A version that was withdrawn, asked for by its name; its digest still works."""

    code = "yanked"


class QuarantinedError(PolicyError):
    """Bytes that nobody may use."""

    code = "quarantined"


class LicenceConflictError(PolicyError):
    """Licences that cannot both be kept; `fields['verdict']` says which."""

    code = "licence-conflict"


class AuthenticationError(PolicyError):
    """No token, or one that is unknown, expired or revoked."""

    code = "unauthenticated"


class ForbiddenError(PolicyError):
    """The token is valid, but not good for this."""

    code = "forbidden"


class RateLimitError(PolicyError):
    """Too many requests in a short time."""

    code = "rate-limited"


class QueueFullError(PolicyError):
    """Too many jobs wait."""

    code = "queue-full"


class DiskLimitError(PolicyError):
    """A composition would take more of the disk than is allowed."""

    code = "disk-limit"


class BaseChangedError(IntegrityError):
    """A base's files are no longer what was fingerprinted."""

    code = "base-changed"


class BlobCorruptError(IntegrityError):
    """A stored file no longer has its digest."""

    code = "blob-corrupt"


class CompositionChangedError(IntegrityError):
    """A composed model is not what its record says; `fields` lists the files that changed, are missing or are more."""

    code = "composition-changed"


class SignatureError(IntegrityError):
    """A signature is not by that key, cannot be read, or is of other files, which `fields` lists."""

    code = "bad-signature"


class RepositoryNotFoundError(NotFoundError):
    """No repository of that name."""

    code = "repository-not-found"


class RevisionNotFoundError(NotFoundError):
    """The repository has no such branch, tag or commit."""

    code = "revision-not-found"


class EntryNotFoundError(NotFoundError):
    """The revision has no such file."""

    code = "entry-not-found"


class RepositoryExistsError(ConflictError):
    """A repository has that name."""

    code = "repository-exists"


class RefExistsError(ConflictError):
    """The repository has that branch or tag."""

    code = "ref-exists"


class StaleParentError(ConflictError):
    """Somebody else has committed since."""

    code = "stale-parent"


class HubUnreachableError(TypedError):
    """The hub of an import does not answer as one."""

    code = "hub-unreachable"
