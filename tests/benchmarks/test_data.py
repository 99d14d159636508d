"""Readers of data files: what they return, and what they say about files that are wrong."""

import gzip
import hashlib

import numpy as np
import pooch
import pytest
import scipy.io

from benchmarks import data
from benchmarks.data.formats import read_idx, read_libsvm, read_olivetti
from benchmarks.data.sources import MNIST, DataError, DataOptions
from tests.benchmarks.data_files import write_faces, write_idx


class TestIdx:
    def test_round_trip(self, tmp_path):
        images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
        write_idx(tmp_path / "images.gz", images)
        np.testing.assert_array_equal(read_idx(tmp_path / "images.gz", ndim=3), images)

    def test_other_number_of_dimensions(self, tmp_path):
        write_idx(tmp_path / "labels.gz", np.zeros(3, np.uint8))
        with pytest.raises(DataError, match=r"labels\.gz.*3 dimensions.*00 00 08 01"):
            read_idx(tmp_path / "labels.gz", ndim=3)

    def test_not_gzip(self, tmp_path):
        (tmp_path / "x.gz").write_bytes(b"<html>not found</html>")
        with pytest.raises(DataError, match=r"x\.gz is not an intact gzip file"):
            read_idx(tmp_path / "x.gz", ndim=1)

    @pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
    def test_cut_short(self, tmp_path, kept):
        write_idx(tmp_path / "x.gz", np.random.default_rng(0).integers(0, 9, 999).astype(np.uint8))
        whole = (tmp_path / "x.gz").read_bytes()
        (tmp_path / "x.gz").write_bytes(whole[: int(kept * len(whole))])
        with pytest.raises(DataError, match="intact gzip"):
            read_idx(tmp_path / "x.gz", ndim=1)

    @pytest.mark.parametrize("change", [-1, 1])
    def test_length_differs_from_header(self, tmp_path, change):
        content = bytes([0, 0, 8, 1, 0, 0, 0, 5]) + bytes(5 + change)
        (tmp_path / "x.gz").write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match=rf"\(5,\).* holds {5 + change}"):
            read_idx(tmp_path / "x.gz", ndim=1)

    def test_empty(self, tmp_path):
        (tmp_path / "x.gz").write_bytes(gzip.compress(b""))
        with pytest.raises(DataError, match="begins with nothing"):
            read_idx(tmp_path / "x.gz", ndim=1)


class TestOlivetti:
    def test_images_are_upright(self, tmp_path):
        faces = write_faces(tmp_path)
        np.testing.assert_array_equal(
            read_olivetti(tmp_path / "olivetti" / "olivettifaces.mat"), faces
        )

    def test_not_matlab(self, tmp_path):
        (tmp_path / "x.mat").write_bytes(b"short")
        with pytest.raises(DataError, match=r"x\.mat is not an intact MATLAB file"):
            read_olivetti(tmp_path / "x.mat")

    def test_other_content(self, tmp_path):
        scipy.io.savemat(tmp_path / "x.mat", {"faces": np.zeros((4, 4), np.uint8)})
        with pytest.raises(DataError, match=r"found uint8\(4, 4\)"):
            read_olivetti(tmp_path / "x.mat")


class TestLibsvm:
    def test_rows(self, tmp_path):
        (tmp_path / "x").write_text("-1 1:1 3:0.5 \n+1 2:2 \n1 \n")
        rows, labels = read_libsvm(tmp_path / "x", features=4)
        np.testing.assert_array_equal(rows, [[1, 0, 0.5, 0], [0, 2, 0, 0], [0, 0, 0, 0]])
        np.testing.assert_array_equal(labels, [-1, 1, 1])
        assert rows.dtype == np.float64

    @pytest.mark.parametrize(
        "content", [b"", b"<html>not found</html>", b"-1 5:1\n", b"-1 0:1\n", b"\xff\xfe 1:1\n"]
    )
    def test_damage(self, tmp_path, content):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(DataError, match="x is not a LIBSVM file"):
            read_libsvm(tmp_path / "x", features=4)

    def test_other_labels(self, tmp_path):
        (tmp_path / "libsvm").mkdir()
        (tmp_path / "libsvm" / "a9a").write_text("2 1:1\n")
        with pytest.raises(DataError, match="labels must be -1 or 1"):
            data.a9a(DataOptions(tmp_path))


class TestSources:
    def test_missing_file_says_what_is_expected(self, tmp_path):
        with pytest.raises(DataError) as error:
            data.mnist(DataOptions(tmp_path))
        for part in ("--data-dir", "$SECONDORDER_DATA", *MNIST.checksums, "DIR/mnist/"):
            assert part in str(error.value)

    def test_failed_download_says_how_to_provide_the_file(self, monkeypatch):
        def refuse(**_):
            raise ConnectionError("no route to host")

        monkeypatch.setattr(pooch, "retrieve", refuse)
        with pytest.raises(DataError, match=r"no route to host") as error:
            data.faces(DataOptions())
        assert "DIR/olivetti/olivettifaces.mat" in str(error.value)

    def test_download_is_kept_and_its_checksum_compared(self, tmp_path, monkeypatch):
        content = b"content"
        name = "train-labels-idx1-ubyte.gz"
        (tmp_path / name).write_bytes(content)
        good = hashlib.sha256(content).hexdigest()
        seen = {}

        def retrieve(url, known_hash, fname, path):
            seen.update(url=url, known_hash=known_hash)
            return str(tmp_path / fname)

        monkeypatch.setattr(pooch, "retrieve", retrieve)
        files = type(MNIST)("mnist", "https://example.org/", {name: good})
        assert files.locate(name, DataOptions()).read_bytes() == content
        assert seen == {"url": f"https://example.org/{name}", "known_hash": f"sha256:{good}"}

    def test_folder_from_environment(self, monkeypatch, tmp_path):
        monkeypatch.setenv("SECONDORDER_DATA", str(tmp_path))
        assert DataOptions.from_environment().directory == tmp_path
        assert DataOptions.from_environment("other").directory.name == "other"

    def test_bad_size(self):
        with pytest.raises(DataError, match="train_size must be at least 1, got 0"):
            DataOptions(train_size=0)


class TestLoaders:
    @pytest.mark.parametrize("load", [data.mnist, data.fashion_mnist])
    def test_idx_data_sets(self, data_folder, load):
        splits = load(DataOptions(data_folder, train_size=20))
        assert splits.train.inputs.shape == (20, 28, 28, 1)
        assert splits.test.inputs.shape == (12, 28, 28, 1)
        assert splits.train.inputs.dtype == np.float32
        assert 0 <= splits.train.inputs.min() < splits.train.inputs.max() <= 1
        assert splits.train.labels.dtype == np.int32

    def test_images_without_their_labels(self, data_folder):
        write_idx(data_folder / "mnist" / "t10k-labels-idx1-ubyte.gz", np.zeros(3, np.uint8))
        with pytest.raises(DataError, match="N labels"):
            data.mnist(DataOptions(data_folder))

    def test_digits(self):
        splits = data.digits(DataOptions())
        assert (len(splits.train), len(splits.test)) == (1500, 297)
        assert splits.train.inputs.shape[1:] == (8, 8, 1)
        assert splits.train.inputs.max() == 1
        again = data.digits(DataOptions(train_size=5))
        np.testing.assert_array_equal(again.train.inputs, splits.train.inputs[:5])
        assert set(splits.test.labels) == set(range(10))

    def test_as_vectors_drops_labels(self):
        vectors = data.digits(DataOptions()).as_vectors()
        assert vectors.train.inputs.shape == (1500, 64)
        assert vectors.train.labels is None


@pytest.mark.data
class TestRealFiles:
    def test_mnist(self, real_data):
        splits = data.mnist(real_data)
        counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert np.bincount(splits.train.labels).tolist() == counts
        assert splits.train.inputs.mean() == pytest.approx(0.1307, abs=1e-4)

    def test_fashion_mnist(self, real_data):
        splits = data.fashion_mnist(real_data)
        assert np.bincount(splits.test.labels).tolist() == [1000] * 10

    def test_faces(self, real_data):
        splits = data.faces(DataOptions(real_data.directory, 2000, 500))
        assert splits.train.inputs.shape == (2000, 25, 25)
        # By person, and the later people are darker: the means differ, the patches do not repeat.
        assert splits.test.inputs.mean() == pytest.approx(-0.46, abs=0.05)
