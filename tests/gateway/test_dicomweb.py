"""DICOMweb through the real client of others, dicomweb-client, and by hand where it is too polite."""

from __future__ import annotations

import asyncio
import io
import json
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import aiohttp
import numpy as np
import pydicom
import pytest
from dicomweb_client import DICOMwebClient
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.datadict import keyword_for_tag
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless, generate_uid
from tests.gateway.conftest import make_instance

from medshard.gateway.archive import Archive
from medshard.gateway.blocks import CachedBlocks
from medshard.gateway.cache import BlockCache
from medshard.gateway.dicomweb import multipart
from medshard.gateway.model import Incoming
from medshard.gateway.tokens import Tokens
from medshard.gateway.web import WebRules, check, serving
from medshard_protocol.errors import Absent, Malformed, Refused

octets = 'multipart/related; type="application/octet-stream"'
stored = 'multipart/related; type="application/dicom"; transfer-syntax=*'


@dataclass
class Site:
    """A gateway's web side, and what talks to it."""

    url: str
    archive: Archive
    http: aiohttp.ClientSession
    cache: BlockCache

    async def dicomweb(self, work: Callable[[DICOMwebClient], Any]) -> Any:
        """Let dicomweb-client do something, in a thread."""
        return await asyncio.to_thread(lambda: work(DICOMwebClient(f"{self.url}/dicom-web")))

    async def get(self, path: str, accept: str = "*/*", **headers: str) -> tuple[int, str, bytes]:
        """Status, content type and body."""
        async with self.http.get(f"{self.url}/dicom-web{path}", headers={"Accept": accept, **headers}) as response:
            return response.status, response.headers.get("Content-Type", ""), await response.read()

    async def post(self, files: list[bytes], path: str = "/studies", kind: str = "application/dicom") -> tuple[int, dict[str, Any]]:
        """STOW by hand."""
        body = b"".join(multipart.head("b", kind, first=n == 0) + file for n, file in enumerate(files)) + multipart.tail("b")
        headers = {"Content-Type": f'multipart/related; type="{kind}"; boundary=b'}
        async with self.http.post(f"{self.url}/dicom-web{path}", data=body, headers=headers) as response:
            return response.status, await response.json(content_type=None)


Serving = Callable[..., Any]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's remarks on its own test files, and requests' on what is around it
        yield


@pytest.fixture
def at_work(archive: Archive, tmp_path: Path) -> Serving:
    @asynccontextmanager
    async def serve(**rules: Any) -> AsyncIterator[Site]:
        cache = BlockCache(tmp_path / "cache", b"c" * 32, bytes_max=256 << 20)
        archive.vault.ranges.blocks = CachedBlocks(cache)
        made = WebRules(**{"host": "127.0.0.1", "port": 0, "tokens": tmp_path / "tokens.json", **rules})
        try:
            async with serving(archive, cache, made) as url, aiohttp.ClientSession() as http:
                yield Site(url, archive, http, cache)
        finally:
            cache.close()

    return serve


@pytest.fixture
async def site(at_work: Serving) -> AsyncIterator[Site]:
    async with at_work() as each:
        yield each


def parts_of(kind: str, body: bytes) -> list[tuple[str, bytes]]:
    """The parts of an answer: content type and bytes."""
    said = multipart.parameters(kind)
    assert said is not None, kind
    parser, found = multipart.Parser(said["boundary"]), []
    for event in parser.feed(body):
        match event:
            case multipart.Begin(headers):
                found.append((headers["content-type"], b""))
            case multipart.Data(data):
                found[-1] = (found[-1][0], found[-1][1] + bytes(data))
    parser.finish()
    return found


async def until_stored(site: Site) -> None:
    await site.archive.settle()
    assert site.archive.waiting() == (0, 0)


def real(name: str) -> bytes:
    return Path(str(get_testdata_file(name))).read_bytes()


def renamed(name: str) -> tuple[bytes, str]:
    """A real file in a study of its own; the file as pydicom writes it, and the path of the instance."""
    dataset = pydicom.dcmread(io.BytesIO(real(name)), force=True)
    study, series, uid = generate_uid(), generate_uid(), generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID = study, series, uid
    dataset.file_meta.MediaStorageSOPInstanceUID = UID(uid)
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue(), f"/studies/{study}/series/{series}/instances/{uid}"


# In and out


@pytest.mark.parametrize("settled", [False, True])
async def test_what_stow_brought_comes_back_byte_for_byte_from_spool_and_store(site: Site, settled: bool) -> None:
    study, series = generate_uid(), generate_uid()
    files = [make_instance(study, series, number=number) for number in range(1, 6)]
    datasets = [pydicom.dcmread(io.BytesIO(file)) for file in files]
    status, said = await site.post(files)
    assert status == 200
    assert [item["00081155"]["Value"][0] for item in said["00081199"]["Value"]] == [each.SOPInstanceUID for each in datasets]
    assert said["00081190"]["Value"] == [f"{site.url}/dicom-web/studies/{study}"]
    if settled:
        await until_stored(site)
    for path in (f"/studies/{study}", f"/studies/{study}/series/{series}"):
        status, kind, body = await site.get(path, stored)
        assert status == 200
        assert [sha256(data).digest() for _, data in parts_of(kind, body)] == [sha256(file).digest() for file in files]
    status, kind, body = await site.get(f"/studies/{study}/series/{series}/instances/{datasets[2].SOPInstanceUID}", "application/dicom")
    assert (status, kind, body) == (200, "application/dicom", files[2])
    back = await site.dicomweb(lambda client: client.retrieve_study(study))
    assert [each.SOPInstanceUID for each in back] == [each.SOPInstanceUID for each in datasets]


async def test_dicomweb_client_stores_searches_and_retrieves(site: Site) -> None:
    study, series = generate_uid(), generate_uid()
    files = [make_instance(study, series, number=number, PatientID=f"P{study}") for number in (1, 2, 3)]
    datasets = [pydicom.dcmread(io.BytesIO(file)) for file in files]
    said = await site.dicomweb(lambda client: client.store_instances(datasets))
    assert len(said.ReferencedSOPSequence) == 3
    (found,) = await site.dicomweb(lambda client: client.search_for_studies(search_filters={"PatientID": f"P{study}"}))
    assert found["0020000D"]["Value"] == [study]
    assert found["00201208"]["Value"] == [3]
    assert found["00100010"]["Value"] == [{"Alphabetic": "Müller^Änne", "Ideographic": "山田^太郎"}]
    (found,) = await site.dicomweb(lambda client: client.search_for_series(study))
    assert (found["0020000E"]["Value"], found["00201209"]["Value"]) == ([series], [3])
    instances = await site.dicomweb(lambda client: client.search_for_instances(study, series))
    assert [each["00200013"]["Value"] for each in instances] == [[1], [2], [3]]
    metadata = await site.dicomweb(lambda client: client.retrieve_series_metadata(study, series))
    loaded = [pydicom.Dataset.from_json(each, lambda *_: b"") for each in metadata]
    assert [each.SOPInstanceUID for each in loaded] == [each.SOPInstanceUID for each in datasets]
    assert str(loaded[0].PatientName) == "Müller^Änne=山田^太郎"
    uid = datasets[1].SOPInstanceUID
    (frame,) = await site.dicomweb(lambda client: client.retrieve_instance_frames(study, series, uid, [1]))
    assert frame == datasets[1].PixelData
    bulk = await site.dicomweb(lambda client: client.retrieve_bulkdata(metadata[1]["7FE00010"]["BulkDataURI"]))
    assert bulk == [datasets[1].PixelData]


async def test_what_was_refused_is_named_and_the_rest_is_kept(site: Site) -> None:
    study = generate_uid()
    good, foreign = make_instance(study), make_instance()
    status, said = await site.post([good, b"no DICOM at all", foreign], f"/studies/{study}")
    assert status == 202
    assert len(said["00081199"]["Value"]) == 1
    assert [item["00081197"]["Value"] for item in said["00081198"]["Value"]] == [[0xC000], [0xA900]]
    status, said = await site.post([b"no DICOM at all"])
    assert status == 409
    assert (await site.post([good]))[0] == 200, "the same bytes again are a success"
    assert (await site.post([], kind="application/dicom+xml"))[0] == 415
    assert (await site.post([]))[0] == 400
    async with site.http.post(
        f"{site.url}/dicom-web/studies", data=b"x", headers={"Content-Type": "multipart/related; boundary=b"}
    ) as answer:
        assert answer.status == 400
    other = make_instance(study, uid=str(pydicom.dcmread(io.BytesIO(good)).SOPInstanceUID))
    status, said = await site.post([other])
    assert status == 202, "other bytes under the same UID are kept, with a warning"
    assert "00081196" in said["00081199"]["Value"][0]


async def test_a_request_that_breaks_off_keeps_what_came_whole(site: Site) -> None:
    study = generate_uid()
    files = [make_instance(study, number=number) for number in (1, 2)]
    body = b"".join(multipart.head("b", "application/dicom", first=n == 0) + file for n, file in enumerate(files))[:-100]
    headers = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=b'}
    async with site.http.post(f"{site.url}/dicom-web/studies", data=body, headers=headers) as response:
        assert response.status == 202
    assert len(site.archive.instances(study)) == 1


async def test_a_search_takes_wildcards_ranges_fields_and_pages(site: Site) -> None:
    marker = generate_uid()[-12:]
    for number in range(4):
        file = make_instance(PatientID=f"S{marker}-{number}", StudyDate=f"2026030{number + 1}", StudyDescription=f"Study {number}")
        await site.archive.receive(Incoming(file))

    async def found(query: str) -> list[dict[str, Any]]:
        async with site.http.get(f"{site.url}/dicom-web/studies?{query}") as response:
            assert response.status == 200, await response.text()
            result: list[dict[str, Any]] = await response.json(content_type=None)
            return result

    everything = f"PatientID=S{marker}-*"
    assert len(await found(everything)) == 4
    assert len(await found(f"{everything}&StudyDate=20260302-20260303")) == 2
    assert len(await found(f"00100020=S{marker}-?&00080020=20260302-")) == 3
    assert len(await found(f"{everything}&ModalitiesInStudy=MR")) == 0
    (one,) = await found(f"PatientID=S{marker}-2&includefield=StudyDescription&includefield=00081030")
    assert one["00081030"]["Value"] == ["Study 2"]
    assert one["00081190"]["Value"][0].startswith(f"{site.url}/dicom-web/studies/")
    pages = [await found(f"{everything}&limit=2&offset={at}") for at in (0, 2, 4)]
    assert [len(page) for page in pages] == [2, 2, 0]
    assert len({each["0020000D"]["Value"][0] for page in pages for each in page}) == 4
    async with site.http.get(f"{site.url}/dicom-web/studies?{everything}&limit=2&fuzzymatching=true") as response:
        assert "fuzzymatching" in response.headers["Warning"]
        assert "more results" in response.headers["Warning"]
    for wrong in ("NoSuchThing=1", "limit=many", "Modality=CT"):
        assert (await site.get(f"/studies?{wrong}"))[0] == 400, wrong
    assert (await site.get("/studies", "image/png"))[0] == 406


# What a client accepts


async def test_compressed_instances_come_decoded_unless_the_client_takes_them_as_they_are(site: Site) -> None:
    file, path = renamed("SC_rgb_rle.dcm")
    await site.archive.receive(Incoming(file))
    status, kind, body = await site.get(path, stored)
    assert (status, parts_of(kind, body)[0][1]) == (200, file)
    status, kind, body = await site.get(path, 'multipart/related; type="application/dicom"')
    ((part_kind, decoded),) = parts_of(kind, body)
    assert part_kind == f"application/dicom; transfer-syntax={ExplicitVRLittleEndian}"
    back = pydicom.dcmread(io.BytesIO(decoded))
    assert back.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert (back.pixel_array == pydicom.dcmread(io.BytesIO(file)).pixel_array).all()
    status, kind, body = await site.get(path, f"application/dicom; transfer-syntax={RLELossless}")
    assert (status, body) == (200, file)
    assert (await site.get(path, f"application/dicom; transfer-syntax={JPEGBaseline8Bit}"))[0] == 406
    assert (await site.get(path, "text/html"))[0] == 406
    assert (await site.get(path, "a b c"))[0] == 400
    status, kind, body = await site.get(path + "/frames/1", 'multipart/related; type="image/dicom-rle"')
    assert parts_of(kind, body)[0][0].startswith("image/dicom-rle")
    status, kind, body = await site.get(path + "/frames/1", octets)
    assert status == 200
    assert len(parts_of(kind, body)[0][1]) == back.pixel_array.nbytes
    assert (await site.get(path + "/frames/1", "image/jpeg"))[0] == 406


async def test_what_does_not_exist_is_not_found(site: Site) -> None:
    file, path = renamed("CT_small.dcm")
    await site.archive.receive(Incoming(file))
    for missing in (
        "/studies/1.2.3",
        path + "9",
        path.replace("/series/", "/series/9"),
        path + "/frames/2",
        path + "/bulkdata/00091001",
        "/studies/no",
    ):
        assert (await site.get(missing))[0] == 404, missing
    assert (await site.get(path + "/frames/0,x"))[0] == 400


# Frames


@pytest.mark.parametrize(
    "name",
    [
        "emri_small.dcm",
        "emri_small_RLE.dcm",
        "emri_small_big_endian.dcm",
        "liver.dcm",
        "emri_small_jpeg_2k_lossless.dcm",
        "color3d_jpeg_baseline.dcm",
    ],
)
async def test_every_frame_of_real_objects_is_what_pydicom_decodes(site: Site, name: str) -> None:
    file, path = renamed(name)
    await site.archive.receive(Incoming(file))
    dataset = pydicom.dcmread(io.BytesIO(file))
    count = int(dataset.NumberOfFrames)
    dataset.pixel_array_options(raw=True)
    pixels = dataset.pixel_array
    status, kind, body = await site.get(f"{path}/frames/{','.join(map(str, range(1, count + 1)))}", octets)
    assert status == 200, body
    frames = parts_of(kind, body)
    assert len(frames) == count
    for number, (_, data) in enumerate(frames):
        if dataset.BitsAllocated == 1:
            bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: pixels[number].size]
            assert (bits == pixels[number].ravel()).all()
        else:
            assert data == pixels[number].astype(pixels.dtype.newbyteorder("<")).tobytes(), number


async def test_one_frame_of_a_large_object_reads_only_its_stripes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, side = 40, 256
    file = make_instance(study := generate_uid(), series := generate_uid(), uid := generate_uid(), NumberOfFrames=frames, size=side)
    dataset = pydicom.dcmread(io.BytesIO(file))
    dataset.PixelData = bytes(np.arange(frames * side * side, dtype=np.uint16).tobytes())
    out = io.BytesIO()
    dataset.save_as(out)
    await site.archive.receive(Incoming(out.getvalue()))
    await until_stored(site)
    fetched: list[range] = []
    from medshard.download import Download

    whole = Download.run

    async def counted(self: Download, wanted: range, take: Any) -> None:
        fetched.append(wanted)
        await whole(self, wanted, take)

    monkeypatch.setattr(Download, "run", counted)
    path = f"/studies/{study}/series/{series}/instances/{uid}"
    _, kind, body = await site.get(f"{path}/frames/31", octets)
    assert parts_of(kind, body)[0][1] == dataset.PixelData[30 * 2 * side * side : 31 * 2 * side * side]
    assert sum(len(run) for run in fetched) <= 2
    before = len(fetched)
    await site.get(f"{path}/frames/31", octets)
    assert len(fetched) == before


# Pictures


async def test_pictures_are_made_of_frames_with_windows_sizes_and_parts(site: Site) -> None:
    file, path = renamed("CT_small.dcm")
    await site.archive.receive(Incoming(file))
    status, kind, body = await site.get(path + "/rendered", "image/png")
    assert (status, kind) == (200, "image/png")
    assert Image.open(io.BytesIO(body)).size == (128, 128)
    status, kind, body = await site.get(path + "/frames/1/rendered?viewport=64,64&window=40,400,linear&quality=80", "image/jpeg")
    assert (status, Image.open(io.BytesIO(body)).size) == (200, (64, 64))
    black = np.asarray(Image.open(io.BytesIO((await site.get(path + "/rendered?window=30000,2,linear", "image/png"))[2])))
    assert black.max() == 0
    status, _, body = await site.get(path.rpartition("/series/")[0] + "/thumbnail", "image/jpeg")
    assert (status, max(Image.open(io.BytesIO(body)).size)) == (200, 128)
    for wrong in ("viewport=1", "window=a,b,linear", "quality=500", "viewport=100000,1"):
        assert (await site.get(f"{path}/rendered?{wrong}", "image/jpeg"))[0] == 400, wrong
    assert (await site.get(path + "/rendered", "application/dicom"))[0] == 406


@pytest.mark.parametrize("name", ["SC_rgb_rle.dcm", "examples_palette.dcm", "US1_J2KR.dcm", "color3d_jpeg_baseline.dcm", "liver.dcm"])
async def test_colours_palettes_and_masks_become_pictures(site: Site, name: str) -> None:
    file, path = renamed(name)
    await site.archive.receive(Incoming(file))
    status, _, body = await site.get(path + "/rendered", "image/png")
    assert status == 200, body
    assert np.asarray(Image.open(io.BytesIO(body))).std() > 0


async def test_wado_uri_gives_pictures_and_instances(site: Site) -> None:
    file, path = renamed("CT_small.dcm")
    await site.archive.receive(Incoming(file))
    _, _, study, _, series, _, uid = path.split("/")
    base = f"{site.url}/wado?requestType=WADO&studyUID={study}&seriesUID={series}&objectUID={uid}"
    async with site.http.get(base) as response:
        assert (response.status, response.content_type) == (200, "image/jpeg")
    async with site.http.get(base + "&contentType=application/dicom") as response:
        assert (response.status, await response.read()) == (200, file)
    async with site.http.get(base + "&contentType=image/png&rows=32&columns=32&windowCenter=40&windowWidth=400") as response:
        assert Image.open(io.BytesIO(await response.read())).size == (32, 32)
    async with site.http.get(base.replace("WADO&", "OTHER&")) as response:
        assert response.status == 400


# The ledger


async def test_a_viewers_many_requests_are_one_entry_on_the_ledger(site: Site) -> None:
    study, serieses = generate_uid(), [generate_uid(), generate_uid()]
    files = [make_instance(study, series, number=number) for series in serieses for number in range(6)]
    for file in files:
        await site.archive.receive(Incoming(file))
    await until_stored(site)
    paths = [f"/studies/{study}/series/{each.series}/instances/{each.uid}/frames/1" for each in site.archive.instances(study)]
    await asyncio.gather(*(site.get(path, octets) for path in [*paths, *paths, *paths]), site.get(f"/studies/{study}/metadata"))
    reads = set()
    for digest in (sha256(files[0]).digest(), sha256(files[-1]).digest()):
        happened = [each for each in await site.archive.vault.shares.log(digest) if each.what == "read"]
        assert [each.purpose for each in happened] == ["treatment"]
        reads.add(happened[0].index)
    assert len(reads) == 1


async def test_metadata_are_made_while_a_series_is_in_the_spool_and_cost_no_read_later(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    study, serieses = generate_uid(), [generate_uid(), generate_uid()]
    for number in range(1, 4):
        for series in serieses:
            await site.archive.receive(Incoming(make_instance(study, series, number=number)))
    await until_stored(site)
    from medshard.gateway.reading import Shelf

    async def never(*_: object) -> bytes:
        raise AssertionError("nothing had to be read")

    monkeypatch.setattr(Shelf, "read", never)
    status, _, body = await site.get(f"/studies/{study}/metadata", "application/dicom+json")
    assert status == 200
    found = json.loads(body)
    assert [each["00200013"]["Value"] for each in found] == [[1], [2], [3]] * 2
    assert {each["0020000E"]["Value"][0] for each in found} == set(serieses)
    monkeypatch.setattr(site.cache, "get", lambda _: None)  # the cache is lost: the index has them, too
    assert (await site.get(f"/studies/{study}/metadata", "application/dicom+json"))[2] == body
    monkeypatch.undo()
    await site.archive.receive(Incoming(make_instance(study, serieses[0], number=4)))
    found = json.loads((await site.get(f"/studies/{study}/metadata", "application/dicom+json"))[2])
    assert sorted(each["00200013"]["Value"][0] for each in found) == [1, 1, 2, 2, 3, 3, 4]


ns = "{http://dicom.nema.org/PS3.19/models/NativeDICOM}"


def as_json(attributes: Element) -> dict[str, Any]:
    """A Native DICOM Model read again, in the shape of DICOM JSON."""
    found: dict[str, Any] = {}
    for each in attributes.findall(ns + "DicomAttribute"):
        kept: dict[str, Any] = {"vr": each.get("vr")}
        keyword = keyword_for_tag(int(each.get("tag", ""), 16))
        assert each.get("keyword", "") == keyword
        for child in each:
            match child.tag.removeprefix(ns):
                case "BulkData":
                    kept["BulkDataURI"] = child.get("uri")
                case "InlineBinary":
                    kept["InlineBinary"] = child.text
                case "Item":
                    kept.setdefault("Value", []).append(as_json(child))
                case "PersonName":
                    names = {group.tag.removeprefix(ns): "^".join(part.text or "" for part in group) for group in child}
                    kept.setdefault("Value", []).append(names)
                case "Value":
                    kept.setdefault("Value", []).append(child.text)
                case other:
                    raise AssertionError(other)
        found[each.get("tag", "")] = kept
    return found


def as_text(value: Any, vr: str) -> Any:
    """DICOM JSON with all its values as text, and names as XML has them: without empty parts."""
    if isinstance(value, dict) and vr == "PN":
        return {group: "^".join(part for part in text.split("^")[:5] if part) for group, text in value.items()}
    if isinstance(value, dict):
        said = value | ({"Value": [as_text(each, value["vr"]) for each in value["Value"] if each is not None]} if "Value" in value else {})
        return {key: as_text(each, "") if vr == "SQ" else each for key, each in said.items() if each != []}
    return value if isinstance(value, list) else str(value)


def texts(dataset: dict[str, Any]) -> dict[str, Any]:
    return {tag: as_text(said, "") for tag, said in dataset.items()}


@pytest.mark.parametrize("name", ["CT_small.dcm", "test-SR.dcm", "rtplan.dcm"])
async def test_data_sets_come_as_xml_with_what_they_have_in_json(site: Site, name: str) -> None:
    file, path = renamed(name)
    assert (await site.post([file]))[0] == 200
    study = path.split("/")[2]
    xml = 'multipart/related; type="application/dicom+xml"'
    for asked in (f"/studies?StudyInstanceUID={study}", f"{path}/metadata", f"/studies/{study}/metadata", f"/studies/{study}/instances"):
        expected = json.loads((await site.get(asked, "application/dicom+json"))[2])
        for accept in (xml, "application/dicom+xml", "image/png, application/dicom+json;q=0.5, application/dicom+xml;q=0.9"):
            status, kind, body = await site.get(asked, accept)
            assert status == 200
            (part,) = parts_of(kind, body)
            assert part[0] == "application/dicom+xml"
            assert texts(as_json(fromstring(part[1]))) == texts(expected[0])
    assert (await site.get("/studies?PatientID=nobody", xml))[0] == 204
    assert (await site.get(f"/studies/{study}/metadata", "text/xml"))[0] == 406
    bad = make_instance(study, PatientName="Ä<&>^B=山田^太郎", StudyDescription="a\x01b")
    headers = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=b', "Accept": "application/dicom+xml"}
    body = multipart.head("b", "application/dicom", first=True) + bad + multipart.tail("b")
    async with site.http.post(f"{site.url}/dicom-web/studies", data=body, headers=headers) as response:
        assert (response.status, response.content_type) == (200, "application/dicom+xml")
        assert as_json(fromstring(await response.read()))["00081199"]["Value"]
    _, *answer = await site.get(f"/studies/{study}/metadata", xml)
    expected = json.loads((await site.get(f"/studies/{study}/metadata"))[2])
    for (_, part), wanted in zip(parts_of(*answer), expected, strict=True):
        found = texts(as_json(fromstring(part)))
        if wanted.get("00081030", {}).get("Value") == ["a\x01b"]:  # XML cannot have it, and the rest comes all the same
            assert found.pop("00081030")["Value"] == ["a\ufffdb"]
        assert found == {tag: found_there for tag, found_there in texts(wanted).items() if tag in found}


async def test_a_series_is_rendered_as_a_picture_of_each_image(site: Site) -> None:
    study, series = generate_uid(), generate_uid()
    assert (await site.post([make_instance(study, series, number=number) for number in range(1, 4)]))[0] == 200
    for path in (f"/studies/{study}/rendered", f"/studies/{study}/series/{series}/rendered"):
        for accept, wanted in (("*/*", "image/jpeg"), ('multipart/related; type="image/png"', "image/png")):
            status, kind, body = await site.get(path + "?viewport=32,32", accept)
            assert status == 200
            parts = parts_of(kind, body)
            assert [each[0] for each in parts] == [wanted] * 3
            assert [Image.open(io.BytesIO(each[1])).size for each in parts] == [(32, 32)] * 3
        assert (await site.get(path, "image/jpeg"))[0] == 406  # one body cannot be three pictures
        assert (await site.get(path, "video/mp4"))[0] == 406
    file, path = renamed("examples_ybr_color.dcm")
    assert (await site.post([file]))[0] == 200
    status, kind, body = await site.get(f"{path}/frames/1,3/rendered", 'multipart/related; type="image/jpeg"')
    assert (status, len(parts_of(kind, body))) == (200, 2)
    assert (await site.get(f"{path}/frames/1,99/rendered", 'multipart/related; type="image/jpeg"'))[0] == 404


# Who may


async def test_with_tokens_only_who_shows_one_is_let_in(at_work: Serving, tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "tokens.json")
    secret = tokens.add("viewer")
    assert secret not in (tmp_path / "tokens.json").read_text()
    async with at_work() as site:
        assert (await site.get("/studies"))[0] == 401
        assert (await site.get("/studies", Authorization="Bearer wrong"))[0] == 401
        assert (await site.get("/studies", Authorization=f"Bearer {secret}"))[0] == 200
        async with site.http.get(f"{site.url}/dicom-web/studies", auth=aiohttp.BasicAuth("anybody", secret)) as response:
            assert response.status == 200
        async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as browser:
            async with browser.post(f"{site.url}/login", data={"token": "wrong"}) as response:
                assert response.status == 401
            async with browser.post(f"{site.url}/login", data={"token": secret}, allow_redirects=False) as response:
                assert response.status == 303
            async with browser.get(f"{site.url}/dicom-web/studies") as response:
                assert response.status == 200
        tokens.remove("viewer")
        tokens.add("another")
        assert (await site.get("/studies", Authorization=f"Bearer {secret}"))[0] == 401


def test_strangers_are_kept_out_at_the_start(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    certificate, viewer = tmp_path / "cert.pem", tmp_path
    with pytest.raises(Refused, match="without TLS"):
        check(WebRules("0.0.0.0", 8042, tokens))
    with pytest.raises(Refused, match="for anybody"):
        check(WebRules("0.0.0.0", 8042, tokens, certificate, certificate))
    with pytest.raises(Malformed, match="no origin"):
        check(WebRules("127.0.0.1", 8042, tokens, cors=("*",)))
    with pytest.raises(Absent, match=r"index\.html"):
        check(WebRules("127.0.0.1", 8042, tokens, viewer=viewer))
    Tokens(tokens).add("somebody")
    check(WebRules("0.0.0.0", 8042, tokens, certificate, certificate))
    check(WebRules("127.0.0.1", 8042, tokens))


async def test_a_strangers_page_in_a_browser_here_reads_nothing(at_work: Serving) -> None:
    async with at_work(cors=("https://viewer.example",)) as site:
        assert (await site.get("/studies", Host="stranger.example"))[0] == 401
        async with site.http.get(f"{site.url}/dicom-web/studies", headers={"Origin": "https://stranger.example"}) as response:
            assert "Access-Control-Allow-Origin" not in response.headers
        async with site.http.get(f"{site.url}/dicom-web/studies", headers={"Origin": "https://viewer.example"}) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "https://viewer.example"
        asked = {"Origin": "https://viewer.example", "Access-Control-Request-Method": "GET"}
        async with site.http.options(f"{site.url}/dicom-web/studies", headers=asked) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == "https://viewer.example"


async def test_the_viewers_folder_is_served_and_nothing_outside_it(at_work: Serving, tmp_path: Path) -> None:
    folder = tmp_path / "viewer"
    folder.mkdir()
    (folder / "index.html").write_text("<title>viewer</title>")
    (folder / "app.js").write_text("1")
    (tmp_path / "secret").write_text("secret")
    async with at_work(viewer=folder) as site:

        async def text(path: str) -> str:
            async with site.http.get(site.url + path) as response:
                return str(await response.text())

        assert await text("/app.js") == "1"
        assert await text("/viewer?StudyInstanceUIDs=1.2") == "<title>viewer</title>"
        assert f"{site.url}/dicom-web" in await text("/app-config.js")
        assert "secret" not in await text("/%2e%2e/secret")
        assert "secret" not in await text("/..%2fsecret")
        assert (await site.get("/nothing"))[0] == 404
