from collections.abc import Iterator

import pytest

from _s3 import s3_endpoint
from frostline.files import DataError, locate, nearest, reaching, read_bytes, scan
from frostline.images import BadImage

USER, PASSWORD = "AKIACANARY", "sec+ret/canary"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """host:port of a real S3 endpoint on loopback, holding s3://data/pets/cat/a.png."""
    with s3_endpoint() as (place, client):
        client.create_bucket(Bucket="data")
        client.put_object(Bucket="data", Key="pets/cat/a.png", Body=b"meow")
        client.put_object(Bucket="data", Key="pets/.hidden/b.png", Body=b"")
        yield place


def options(endpoint: str) -> str:
    return f"?endpoint_override={endpoint}&scheme=http&region=us-east-1"


def test_a_local_folder_is_listed_without_what_is_hidden(tmp_path):
    for name in ("b/x.png", "a/deep/y.png", ".git/z", "a/._y.png", "top.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    place = locate(str(tmp_path))
    tree = scan(place)
    assert list(tree.files) == ["a/deep/y.png", "b/x.png", "top.txt"]
    assert tree.folders == ("a", "a/deep", "b")
    assert not tree.is_file
    assert read_bytes(place / "a/deep/y.png") == b"a/deep/y.png"
    assert (place / "a/deep/y.png").parent.name == f"{tmp_path}/a/deep"


def test_paths_are_relative_to_here_or_home_or_file_uris(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("x", "~/x", f"file://{tmp_path}/x"):
        assert list(scan(locate(path)).files) == ["x"]
        assert scan(locate(path)).is_file
        assert read_bytes(locate(path)) == b"1"


def test_compressed_files_are_read_as_they_lie(tmp_path):
    (tmp_path / "x.gz").write_bytes(b"not gzip at all")
    assert read_bytes(locate(f"{tmp_path}/x.gz")) == b"not gzip at all"


def test_a_missing_path_names_its_neighbour(tmp_path):
    (tmp_path / "flowers").mkdir()
    with pytest.raises(DataError, match=r"/flower does not exist; did you mean 'flowers'\?"):
        scan(locate(f"{tmp_path}/flower"))
    with pytest.raises(DataError, match=r"nowhere/at/all does not exist$"):
        scan(locate(f"{tmp_path}/nowhere/at/all"))


def test_a_missing_file_is_one_bad_image(tmp_path):
    with pytest.raises(BadImage, match="missing: no such file"):
        read_bytes(locate(f"{tmp_path}/gone.png"))


def test_nearest():
    assert nearest("lable", ["image", "label"]) == "; did you mean 'label'?"
    assert nearest("zzz", ["image", "label"]) == ""


@pytest.mark.parametrize("login", ["", "key:secret@"])
def test_s3_with_the_endpoint_in_the_uri(endpoint, login, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    place = locate(f"s3://{login}data/pets/{options(endpoint)}")
    assert place.name == "s3://data/pets"
    tree = scan(place)
    assert list(tree.files) == ["cat/a.png"]
    assert tree.folders == ("cat",)
    assert read_bytes(place / "cat/a.png") == b"meow"
    with pytest.raises(BadImage, match="missing"):
        read_bytes(place / "cat/b.png")


def test_s3_with_the_endpoint_in_the_environment(endpoint, monkeypatch):
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{endpoint}",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    assert list(scan(locate("s3://data/pets")).files) == ["cat/a.png"]
    assert scan(locate("s3://data/pets/cat/a.png")).is_file


def test_s3_errors_teach(endpoint):
    login = "key:secret@"
    with pytest.raises(DataError, match=r"^s3://data/pet does not exist; did you mean 'pets'\?$"):
        scan(locate(f"s3://{login}data/pet{options(endpoint)}"))
    with pytest.raises(DataError, match=r"s3://nobucket/x.* (does not exist|NO_SUCH_BUCKET)"):
        scan(locate(f"s3://{login}nobucket/x{options(endpoint)}"))


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIACANARY:sec%2Bret%2Fcanary@data/a b",  # not a URI: the whole text is in Arrow's message
        "s3://AKIACANARY:sec+ret/canary@data/x?bogus=1",  # a slash that should have been encoded
        "s3://AKIACANARY:sec%2Bret%2Fcanary@data/x?bogus=AKIACANARY",
        "ftp://AKIACANARY:sec+ret@host/x",
        "s3://AKIACANARY@/x y",
        "abfs://AKIACANARY:sec+ret/canary@container/x?client_secret=sec%2Bret%2Fcanary",
    ],
)
def test_no_message_holds_credentials(uri):
    with pytest.raises(DataError) as caught:
        scan(locate(uri))
    shown = f"{caught.value} {caught.value.__cause__} {caught.value.__suppress_context__}"
    for canary in (USER, PASSWORD, "sec%2Bret", "canary"):
        assert canary not in shown
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_server_that_names_the_key_is_censored():
    place = locate("s3://AKIACANARY:sec%2Bret@bucket/x?region=us-east-1")
    with (
        pytest.raises(DataError, match=r"^cannot read s3://bucket/x: no key \*\*\* with \*\*\*, \*\*\*$"),
        reaching(place),
    ):
        raise OSError("no key AKIACANARY with sec+ret, sec%2Bret")


def test_unknown_schemes_name_the_known():
    with pytest.raises(DataError, match=r"https://x/y: no file system is known for https://; there are file, s3, gs"):
        locate("https://x/y")
