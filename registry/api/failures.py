"""Every failure as ``{"error": {code, category, message, expected, found, remedy, fields}}``, and its status.

usage 400   unauthenticated 401   policy 403   not-found 404   conflict 409   incompatible 422
integrity 422   internal 500
upload-too-large 413     queue-full, rate-limited 429     storage, disk-limit 507
stale-parent 412     method-not-allowed 405
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from composer.errors import TypedError
from registry.errors import ForbiddenError

__all__ = ["RESPONSES", "ErrorBody", "add_handlers", "error_response", "log_failure", "status_of"]

STATUS_OF_CATEGORY = {
    "usage": 400,
    "policy": 403,
    "not-found": 404,
    "conflict": 409,
    "incompatible": 422,
    "integrity": 422,
    "internal": 500,
}
STATUS_OF_CODE = {
    "unauthenticated": 401,
    "stale-parent": 412,
    "upload-too-large": 413,
    "queue-full": 429,
    "rate-limited": 429,
    "storage": 507,
    "disk-limit": 507,
}
CATEGORY_OF_STATUS = {403: "policy", 413: "policy", 404: "not-found", 409: "conflict"}
CODE_OF_STATUS = {400: "bad-request", 404: "not-found", 405: "method-not-allowed", 413: "upload-too-large"}

log = logging.getLogger(__name__)


class ErrorFields(BaseModel):
    """One failure; `code` and `category` are stable, the message is for people."""

    code: str
    category: str = Field(description="usage, not-found, incompatible, integrity, policy, conflict or internal")
    message: str
    expected: Any = None
    found: Any = None
    remedy: str | None = None
    fields: dict[str, Any] | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorFields


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request was refused"},
    "5XX": {"model": ErrorBody, "description": "The service failed"},
}


def status_of(error: TypedError) -> int:
    """The HTTP status of a failure."""
    return STATUS_OF_CODE.get(error.code) or STATUS_OF_CATEGORY.get(error.category, 500)


def error_response(error: TypedError) -> JSONResponse:
    """A typed failure as a response."""
    status = status_of(error)
    headers = {"WWW-Authenticate": 'Bearer realm="registry"'} if status == HTTPStatus.UNAUTHORIZED else {}
    if "retry_after" in error.fields:
        headers["Retry-After"] = str(error.fields["retry_after"])
    return JSONResponse({"error": error.as_dict()}, status, headers=headers)


def log_failure(request: Request, error: TypedError) -> None:
    """Log a failure that is the service's own, and note in the audit log what somebody was not allowed to do."""
    if status_of(error) >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("%s %s: %s", request.method, request.url.path, error, exc_info=error)
    if isinstance(error, ForbiddenError) and (principal := getattr(request.state, "principal", None)):
        registry = request.app.state.registry.acting_as(principal)
        registry.note_denied(f"{request.method} {request.url.path}", error.code)


def add_handlers(app: FastAPI) -> None:
    """Give every failure of `app` the same shape."""

    @app.exception_handler(TypedError)
    def typed(request: Request, error: TypedError) -> JSONResponse:
        log_failure(request, error)
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = [{"where": ".".join(map(str, item["loc"])), "problem": item["msg"]} for item in error.errors()]
        message = "; ".join(f"{item['where']}: {item['problem']}" for item in problems)
        return _response(400, "bad-request", "usage", message, fields={"problems": problems})

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> JSONResponse:
        status = error.status_code
        code = CODE_OF_STATUS.get(status, "bad-request")
        category = CATEGORY_OF_STATUS.get(status, "internal" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "usage")
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _response(status, code, category, message, headers=error.headers)

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _response(
            500, "internal-error", "internal", "the service failed unexpectedly", remedy="see the service's log"
        )


def _response(status: int, code: str, category: str, message: str, headers: Any = None, **more: Any) -> JSONResponse:
    body = {"error": {"code": code, "category": category, "message": message, **more}}
    return JSONResponse(body, status, headers=headers)
