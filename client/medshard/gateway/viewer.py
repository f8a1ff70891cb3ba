"""A built web viewer, such as OHIF's, in front of this gateway's DICOMweb.

Law: files of one folder, and nothing outside it. Paths that are no file are the viewer's own pages, and get its first page; its
configuration is written here, so that the folder can stay as it was unpacked.
"""

from __future__ import annotations

import json
import mimetypes
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from medshard.gateway.dicomweb.http import origin
from medshard_protocol.errors import Absent

configuration: Final = "app-config.js"
_headers: Final = {
    "Cross-Origin-Opener-Policy": "same-origin",  # the viewer's workers share memory, which browsers grant to isolated pages alone
    "Cross-Origin-Embedder-Policy": "require-corp",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # addresses of studies stay here
}


class Viewer:
    """Routes for all that is not DICOMweb."""

    def __init__(self, folder: Path, dicom_web: str) -> None:
        self._folder = folder.resolve()
        self._dicom_web = dicom_web

    def routes(self) -> list[web.RouteDef]:
        """The last routes of an application: they take what is left."""
        return [web.get("/" + configuration, self.configured), web.get("/{path:.*}", self.file)]

    async def configured(self, request: web.Request) -> web.StreamResponse:
        """OHIF's configuration, with this gateway as its one source of data."""
        own = origin(request)
        source: dict[str, Any] = {
            "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
            "sourceName": "dicomweb",
            "configuration": {
                "friendlyName": "medshard",
                "name": "medshard",
                "qidoRoot": own + self._dicom_web,
                "wadoRoot": own + self._dicom_web,
                "wadoUriRoot": own + "/wado",
                "qidoSupportsIncludeField": True,
                "imageRendering": "wadors",
                "thumbnailRendering": "wadors",
                "enableStudyLazyLoad": True,
                "supportsFuzzyMatching": False,
                "supportsWildcard": True,
                "dicomUploadEnabled": True,
                "omitQuotationForMultipartRequest": True,
                "bulkDataURI": {"enabled": True},
            },
        }
        config = {
            "routerBasename": "/",
            "extensions": [],
            "modes": [],
            "showStudyList": True,
            "showWarningMessageForCrossOrigin": False,
            "investigationalUseDialog": {"option": "never"},
            "defaultDataSourceName": "dicomweb",
            "dataSources": [source],
        }
        return web.Response(text=f"window.config = {json.dumps(config)};\n", content_type="application/javascript", headers=_headers)

    async def file(self, request: web.Request) -> web.StreamResponse:
        """One file of the folder, or the first page."""
        wanted = request.match_info["path"]
        if wanted.startswith(("dicom-web/", "wado/")):
            raise Absent("there is nothing at this address")
        path = (self._folder / wanted).resolve()
        if not path.is_relative_to(self._folder) or not path.is_file():
            path = self._folder / "index.html"
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return web.FileResponse(path, headers={**_headers, "Content-Type": kind})
