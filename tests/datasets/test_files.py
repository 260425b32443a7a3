"""Files of data sets that are damaged, foreign, or made to harm: one error with the path, within bounds of memory."""

import gzip
import io
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
import scipy.io
from PIL import Image

from pyro_mm import datasets
from pyro_mm.datasets import files, published
from pyro_mm.datasets.files import check_file_names, read_arrays
from tests.support.published_files import write_celeba, write_polymnist, write_svhn


@pytest.fixture(autouse=True)
def no_shared_data(monkeypatch):
    monkeypatch.delenv("PYRO_MM_DATA", raising=False)


@pytest.fixture
def little_memory():
    """The test takes less than 8 MB at any moment."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6, f"{peak:,.0f} bytes"


# -- decompression --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zeros():
    """A gigabyte of zeros in a megabyte."""
    member = gzip.compress(bytes(2**24), 9)
    return member * 64


def test_a_compressed_file_is_read_up_to_the_size_of_the_right_one(tmp_path, zeros, little_memory):
    path = tmp_path / f"{datasets.FILES[0]}.gz"
    path.write_bytes(zeros)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is too large: .* expected 10,000 at most"):
        files.read_decompressed(path, 10_000)
    path.write_bytes(zeros[: len(zeros) // 64])
    with pytest.raises(ValueError, match=r"is too large: it decompresses to more than the 10,000 bytes of the right"):
        files.read_decompressed(path, 10_000)


def test_size_limits_are_the_sizes_of_the_published_files():
    """60,000 and 10,000 rows of 28 x 28 bytes or one, after headers of 16 and 8 bytes."""
    from pyro_mm.datasets.images import SIZES

    assert tuple(n * size + head for n in (60_000, 10_000) for size, head in ((784, 16), (1, 8))) == SIZES


def test_mnist_refuses_a_file_that_unpacks_to_more_than_its_size(tmp_path, zeros):
    for name in datasets.FILES:
        (tmp_path / name).write_bytes(zeros[: len(zeros) // 8])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte is too large"):
        datasets.mnist(tmp_path)


def header(shape, dtype="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_an_npz_file_is_weighed_before_it_is_read(tmp_path, little_memory):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header((10**12,)) + bytes(100))
    with pytest.raises(ValueError, match=r"x.npz is damaged: a has 100 bytes, too few or too many for \(10+,\)"):
        read_arrays(path, {"a": ("n",)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", header((10**5,)) + bytes(4 * 10**5))
    with pytest.raises(ValueError, match=r"x.npz would take 400,\d+ bytes of memory, more than 100,000"):
        read_arrays(path, {"a": ("n",)}, max_bytes=10**5)


def test_a_matlab_file_is_weighed_before_it_is_read(tmp_path, monkeypatch):
    write_svhn(tmp_path)
    monkeypatch.setattr(scipy.io, "loadmat", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"train_32x32.mat: expected 1 to 4 rows, got 5"):
        published.read_svhn(tmp_path / "train_32x32.mat", max_rows=4)


# -- files that are not what they should be -------------------------------------------------------------------------


def foreign():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    yield "npy", buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../a.npy", b"no array")
        archive.writestr("a", b"no array either")
    yield "zip", buffer.getvalue()
    yield "empty", b""
    yield "text", b"a, b\n1, 2\n"
    yield "pickle", pickle.dumps({"a": np.zeros(3)})
    yield "hdf5", b"\x89HDF\r\n\x1a\n" + bytes(600)
    yield "matlab 7.3", b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(600)


def cut(path):
    whole = path.read_bytes()
    return [whole[:n] for n in (1, 7, len(whole) // 3, len(whole) // 2, len(whole) - 5)]


def test_a_damaged_npz_file_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.arange(2000.0), b=np.arange(2000))
    wanted = {"a": ("n",), "b": ("n",)}
    assert [x.sum() for x in read_arrays(path, wanted)] == [1999000, 1999000]
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 0x55
    for content in [*cut(path), bytes(flipped), *dict(foreign()).values()]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.npz (is damaged|lacks)") as caught:
            read_arrays(path, wanted)
        assert "pickle" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_arrays(tmp_path / "nowhere.npz", wanted)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"b": np.zeros((3, 2))}, r"expected b of shape \(n, 4\) with n = 3 and not empty, got \(3, 2\)"),
        ({"b": np.zeros((2, 4))}, r"expected b of shape \(n, 4\) with n = 3 and not empty, got \(2, 4\)"),
        ({"b": np.zeros(3)}, r"expected b of shape \(n, 4\) .*got \(3,\)"),
        ({"a": np.zeros(0), "b": np.zeros((0, 4))}, r"expected a of shape \(n\) .*and not empty, got \(0,\)"),
        ({"b": np.full((3, 4), np.nan)}, "b has values that are not finite"),
        ({"b": np.full((3, 4), "x")}, "expected b to hold numbers, found <U1"),
        ({"b": np.full((3, 4), None)}, "expected b to hold numbers, found Python objects, which are not read"),
        ({"b": np.zeros((3, 4), complex)}, "expected b to hold numbers, found complex128"),
        ({"c": np.zeros(3)}, "expected c to hold text, found float64"),
    ],
)
def test_arrays_of_another_shape_or_dtype_are_refused(tmp_path, held, message):
    path = tmp_path / "x.npz"
    np.savez(path, **{"a": np.zeros(3), "b": np.zeros((3, 4)), "c": np.array(["x", "y", "z"])} | held)
    with pytest.raises(ValueError, match=rf"x.npz: {message}"):
        read_arrays(path, {"a": ("n",), "b": ("n", 4), "c": ("n",)}, texts=("c",))


def test_a_damaged_matlab_file_is_refused(tmp_path):
    write_svhn(tmp_path)
    path = tmp_path / "test_32x32.mat"
    for content in [*cut(path), *dict(foreign()).values()]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"test_32x32.mat(:| is damaged, or no MATLAB file up to version 7)"):
            datasets.svhn(tmp_path)


def test_a_damaged_image_file_is_refused(tmp_path):
    write_celeba(tmp_path)
    path = tmp_path / "img_align_celeba" / "000002.jpg"
    for content in [b"", b"no picture", path.read_bytes()[:400], path.read_bytes()[:-4000]]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"000002.jpg is damaged, no picture, or too large"):
            datasets.celeba(tmp_path)


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    write_celeba(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"000001.jpg is damaged, no picture, or too large: DecompressionBombError"):
        datasets.celeba(tmp_path)


def test_pictures_of_one_modality_are_of_one_size(tmp_path):
    """One of 1 x 1 pixels would be spread over all of them."""
    write_polymnist(tmp_path / "MMNIST")
    Image.new("RGB", (1, 1)).save(tmp_path / "MMNIST" / "test" / "m1" / "0.1.png")
    with pytest.raises(ValueError, match=r"0.1.png is of shape|and .*0.1.png of"):
        datasets.polymnist(tmp_path)


# -- paths ----------------------------------------------------------------------------------------------------------

OUTSIDE = ["../secret.jpg", "/etc/passwd", "a/b.jpg", "..", ".", "a\\b.jpg", "C:\\x.jpg", "C:x.jpg", "\\\\host\\x\\y"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_file_name_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    (tmp_path / "secret.jpg").touch()
    write_celeba(tmp_path / "celeba")
    for file in ("list_attr_celeba.txt", "list_eval_partition.txt"):
        path = tmp_path / "celeba" / file
        path.write_text(path.read_text().replace("000001.jpg", name))
    with pytest.raises(ValueError, match=r"list_eval_partition.txt names .*, which leads out of its folder"):
        datasets.celeba(tmp_path)


def test_a_plain_file_name_is_accepted_and_an_empty_one_refused():
    check_file_names("x", ["000001.jpg", "a b.png", ".hidden", "x..y", "ä.jpg"])
    with pytest.raises(ValueError, match="names '', which leads"):
        check_file_names("x", [""])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"000001.jpg 0 0\n", "expected a file and 0, 1 or 2, got '000001.jpg 0 0'"),
        (b"000001.jpg 3\n", "expected a file and 0, 1 or 2, got '000001.jpg 3'"),
        (b"000001.jpg\n", "expected a file and 0, 1 or 2"),
        (b"\xff\xfe\x00", "is damaged, or no text"),
        (b"", "has no rows of part 0"),
    ],
)
def test_a_partition_file_of_another_format_is_refused(tmp_path, content, message):
    write_celeba(tmp_path)
    (tmp_path / "list_eval_partition.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"list_eval_partition.txt:? {message}"):
        datasets.celeba(tmp_path)


# -- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("mnist", {"directory": 3}, TypeError),
        ("mnist", {"directory": ""}, ValueError),
        ("svhn", {"directory": ["a"]}, TypeError),
        ("celeba", {"size": 0}, ValueError),
        ("celeba", {"size": 64.0}, TypeError),
        ("celeba", {"crop": -1}, ValueError),
        ("celeba", {"rows": 5}, TypeError),
        ("celeba", {"rows": (5, 0)}, ValueError),
        ("celeba", {"rows": (5, 2, 1)}, TypeError),
        ("celeba", {"attributes": ["Bald", "Bald"]}, ValueError),
        ("celeba", {"attributes": []}, ValueError),
        ("celeba", {"attributes": 3}, TypeError),
        ("celeba", {"held_out": 1}, TypeError),
        ("polymnist", {"views": 1.5}, TypeError),
        ("polymnist", {"views": -1}, ValueError),
        ("mnist-photographs", {"views": "3"}, TypeError),
        ("mnist-photographs", {"rows": (0, 1)}, ValueError),
        ("mnist-usps-word", {"repeat": 1}, TypeError),
        ("mnist-svhn", {"word": "yes"}, TypeError),
        ("mfeat", {"standardise": 1}, TypeError),
        ("pom", {"held_out": "valid"}, ValueError),
    ],
)
def test_arguments_of_data_sets_are_checked_before_files_are_read(tmp_path, name, options, error):
    """With the argument's name, before any file is looked at where that can be."""
    write_celeba(tmp_path / "celeba")
    write_polymnist(tmp_path / "MMNIST")
    with pytest.raises(error, match=next(iter(options))):
        datasets.load(name, **{"directory": tmp_path} | options)


def test_one_attribute_of_celeba_may_be_given_by_its_name(tmp_path):
    write_celeba(tmp_path)
    assert datasets.celeba(tmp_path, size=2, attributes="Bald")[0]["attributes"].shape == (5, 1)
