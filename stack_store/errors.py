"""The errors of the store. Knows no HTTP status; whoever answers a client maps these classes.

StoreError
├── StoreNotFound         the folder is not a store
├── StoreExists           a store is already there
├── ManifestInvalid       manifest.json is not what it must be
├── GenerationConflict    the store changed since the caller looked
├── StackInvalid          a file is not a well-formed stack; the message names the fault
├── StackIncompatible     a well-formed stack of another base
├── DigestMismatch        the bytes are not those that the digest names
├── DomainNameInvalid     a name that no domain may bear
├── DomainNotFound        no domain of that name
├── DomainInvalid         good stacks that do not make up this domain
├── DomainTooLarge        a domain that could never be resident
├── ImportRefused         a path that the import root does not contain
├── UploadTooLarge        more bytes than an upload may have
├── UploadNotFound        no upload of that digest
├── ObjectStorageInvalid  a root or an option that no driver takes; the settings are wrong
├── ObjectRefused         a URL that is not plainly under a root
├── ObjectNotFound        nothing is stored under that URL
├── ObjectDenied          the storage does not let us read it
├── ObjectUnavailable     the storage can't be reached, or broke off
├── DownloadStopped       the server ends before the object is here
├── DiskFull              the disk has no room for what was to be written
├── DiskFailed            the disk cannot be read or written
└── CacheError
    ├── MixTooLarge       a mix that could never be resident at once
    ├── LoadFailed        a domain of the mix could not be loaded
    │   └── MemoryExhausted   because there is no memory for it at present
    ├── LeaseTimedOut     the mix was not resident in time
    └── CacheClosed       the cache was closed before the lease was granted
"""


class StoreError(Exception):
    """Any refusal by the store. Nothing was changed."""


class StoreNotFound(StoreError):
    pass


class StoreExists(StoreError):
    pass


class ManifestInvalid(StoreError):
    pass


class GenerationConflict(StoreError):
    def __init__(self, *, expected: int, current: int) -> None:
        super().__init__(f"the store is at generation {current}, not at {expected}")
        self.expected = expected
        self.current = current


class StackInvalid(StoreError):
    pass


class StackIncompatible(StoreError):
    pass


class DigestMismatch(StoreError):
    pass


class DomainNameInvalid(StoreError):
    pass


class DomainNotFound(StoreError):
    pass


class DomainInvalid(StoreError):
    pass


class DomainTooLarge(StoreError):
    pass


class ImportRefused(StoreError):
    pass


class UploadTooLarge(StoreError):
    pass


class UploadNotFound(StoreError):
    pass


class ObjectStorageInvalid(StoreError):
    pass


class ObjectRefused(StoreError):
    pass


class ObjectNotFound(StoreError):
    pass


class ObjectDenied(StoreError):
    pass


class ObjectUnavailable(StoreError):
    pass


class DownloadStopped(StoreError):
    pass


class DiskFull(StoreError):
    pass


class DiskFailed(StoreError):
    pass


class CacheError(StoreError):
    pass


class MixTooLarge(CacheError):
    pass


class LoadFailed(CacheError):
    pass


class MemoryExhausted(LoadFailed):
    pass


class LeaseTimedOut(CacheError):
    pass


class CacheClosed(CacheError):
    pass
