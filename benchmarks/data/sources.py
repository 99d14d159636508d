"""Where data files come from: a folder of the user's, else a checked download.

The folder is ``--data-dir`` or ``$SECONDORDER_DATA`` and is only read. Without one, files are
downloaded into the cache folder of the operating system and their SHA-256 is compared.
"""

import dataclasses
import os
from pathlib import Path

import pooch

DATA_VARIABLE = "SECONDORDER_DATA"
CACHE_NAME = "secondorder"


class DataError(RuntimeError):
    """A data file is missing, unreadable or not what its name promises."""


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """How much data to take, and from where.

    Attributes:
        directory: Folder with one sub-folder per data set; None downloads.
        train_size: Number of training samples; None takes all, or the papers' count for
            generated data.
        test_size: The same for the test part.
    """

    directory: Path | None = None
    train_size: int | None = None
    test_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("train_size", "test_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise DataError(f"{name} must be at least 1, got {size}.")

    @classmethod
    def from_environment(
        cls,
        directory: str | os.PathLike[str] | None = None,
        train_size: int | None = None,
        test_size: int | None = None,
    ) -> "DataOptions":
        """The options with ``$SECONDORDER_DATA`` as the folder when none is given."""
        chosen = directory or os.environ.get(DATA_VARIABLE)
        return cls(Path(chosen).expanduser() if chosen else None, train_size, test_size)


@dataclasses.dataclass(frozen=True)
class FileSet:
    """The files of one data set.

    Attributes:
        folder: Name of its sub-folder below the data folder.
        base_url: Address of the files, without the file name.
        checksums: SHA-256 by file name.
    """

    folder: str
    base_url: str
    checksums: dict[str, str]

    def locate(self, name: str, options: DataOptions) -> Path:
        """Path of one file, downloaded first if the user has no data folder.

        Args:
            name: One of the names in ``checksums``.
            options: Says where the data folder is, if there is one.

        Returns:
            A path that exists.

        Raises:
            DataError: The file is not in the data folder, or could not be downloaded.
        """
        if options.directory is not None:
            path = options.directory / self.folder / name
            if not path.is_file():
                raise DataError(f"{path} does not exist.\n{self._how_to_provide()}")
            return path
        return self._download(name)

    def _download(self, name: str) -> Path:
        try:
            path = pooch.retrieve(
                url=self.base_url + name,
                known_hash=f"sha256:{self.checksums[name]}",
                fname=name,
                path=cache_folder() / self.folder,
            )
        # No connection and HTTP errors are OSErrors; a wrong checksum is a ValueError.
        except (OSError, ValueError) as error:
            raise DataError(
                f"Could not download {self.base_url}{name}: {error}\n{self._how_to_provide()}"
            ) from error
        return Path(path)

    def _how_to_provide(self) -> str:
        layout = "\n".join(f"  DIR/{self.folder}/{name}" for name in self.checksums)
        return f"Give a folder DIR with --data-dir or ${DATA_VARIABLE}. Expected in it:\n{layout}"


def cache_folder() -> Path:
    """Folder of downloads and generated arrays in the cache of the operating system."""
    return Path(pooch.os_cache(CACHE_NAME))


MNIST = FileSet(
    folder="mnist",
    base_url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    checksums={
        "train-images-idx3-ubyte.gz": (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
        ),
        "train-labels-idx1-ubyte.gz": (
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
        ),
        "t10k-images-idx3-ubyte.gz": (
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
        ),
        "t10k-labels-idx1-ubyte.gz": (
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
        ),
    },
)

FASHION_MNIST = FileSet(
    folder="fashion_mnist",
    base_url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    checksums={
        "train-images-idx3-ubyte.gz": (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
        ),
        "train-labels-idx1-ubyte.gz": (
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
        ),
        "t10k-images-idx3-ubyte.gz": (
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
        ),
        "t10k-labels-idx1-ubyte.gz": (
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
        ),
    },
)

OLIVETTI = FileSet(
    folder="olivetti",
    base_url="https://cs.nyu.edu/~roweis/data/",
    checksums={
        "olivettifaces.mat": "b1988d02c72fe5b8ee82b5ef3bb7982eafc74f1e1ff0ae0ade35061ad0af534d"
    },
)

A9A = FileSet(
    folder="libsvm",
    base_url="https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/",
    checksums={"a9a": "f5d5ffd8d865ff41328e7ee043e4b020816914ff6843ff15b98905ddbedce906"},
)

CIFAR10 = FileSet(
    folder="cifar10",
    base_url="https://www.cs.toronto.edu/~kriz/",
    checksums={
        "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    },
)

TINY_SHAKESPEARE = FileSet(
    folder="tinyshakespeare",
    base_url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
    checksums={"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
)
