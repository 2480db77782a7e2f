"""transformers' own OpenAI-compatible server around an AMVL model; all that is touched of `transformers.cli.serving` is here.

That package is no public interface. This was run with transformers 5.23 and 5.24.
"""

import asyncio
import contextlib
import inspect
import json
import logging
import socket
import time
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import PreTrainedConfig
from transformers.utils.import_utils import is_serve_available

from modeling_amvl import AMVLConfig, AMVLForConditionalGeneration, AMVLProcessor


if not is_serve_available():
    raise ImportError(
        "`fastapi`, `uvicorn`, `openai` and `pydantic` are needed to serve, one is missing: `pip install -e '.[serve]'`."
    )

import uvicorn
from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState, Modality

from .proof import prove_latents
from .requests import MAX_LATENT_TEMPERATURE, read_request


logger = logging.getLogger(__name__)

KEPT_ROUTES = {"/v1/chat/completions", "/health"}  # the others load other models, unload this one, or know no latents
SECONDS_TO_STOP = 5  # for answers in progress, after SIGTERM or Ctrl-C


class AMVLModelManager(ModelManager):
    """Loads one checkpoint, as our class and no other, and keeps it."""

    def __init__(self, checkpoint, revision=None, **settings):
        self.checkpoint, self.revision = checkpoint, revision
        folder = Path(checkpoint)
        # A client need not know where the server keeps its folders.
        super().__init__(force_model=folder.resolve().name if folder.is_dir() else checkpoint, **settings)

    @staticmethod
    def process_model_name(model_id):
        return model_id

    def _load_processor(self, model_id_and_revision, gguf_file=None):
        return AMVLProcessor.from_pretrained(self.checkpoint, revision=self.revision)

    def _load_model(self, model_id_and_revision, tqdm_class=None, progress_callback=None, gguf_file=None):
        model = AMVLForConditionalGeneration.from_pretrained(
            self.checkpoint,
            revision=self.revision,
            attn_implementation=self.attn_implementation,
            dtype=self.dtype,
            device_map=self.device,
        )
        refuse_untrained(model, self.checkpoint)
        return model

    @staticmethod
    def get_model_modality(model, processor=None):
        return Modality.VLM


class AskedModel:
    """
    A model as one request asks it. The server calls `generate` on the one thread that generates, one request at a time.

    Args:
        model ([`AMVLForConditionalGeneration`]): all that is not said here.
        tokenizer (`PreTrainedTokenizerBase`): finds the `stop` texts.
        request (`dict`): the checked body.
    """

    def __init__(self, model, tokenizer, request):
        self.model, self.tokenizer, self.request = model, tokenizer, request

    def __getattr__(self, name):
        return getattr(self.model, name)

    def settle(self, inputs, generation_config):
        """Says in `generation_config` whether to sample, and how long the answer may be; raises where the prompt is too long."""
        if (temperature := self.request.get("temperature")) is not None:
            generation_config.do_sample = temperature > 0
            if temperature == 0:
                generation_config.temperature = None
        asked = self.request.get("max_completion_tokens", self.request.get("max_tokens"))
        window = getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if window is None:
            return
        num_prompt, num_latents = inputs["input_ids"].shape[-1], self.config.num_latents
        room = window - num_prompt - num_latents
        if room < (asked or 1):
            answer = f" and {asked} of an answer (`max_tokens`)" if asked else ""
            raise HTTPException(
                400,
                f"The messages are {num_prompt} tokens long, images included: with {num_latents} latents{answer} that is more "
                f"than the model's {window}. Send less{', or ask for less' if asked else ''}.",
            )
        generation_config.max_new_tokens = min(generation_config.max_new_tokens, room)

    def generate(self, **kwargs):
        kwargs["tokenizer"] = self.tokenizer  # the server passes the processor, which has no vocabulary
        seed = self.request.get("seed")
        try:
            with torch.random.fork_rng(enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                return self.model.generate(latent_temperature=self.request.get("latent_temperature"), **kwargs)
        except (RuntimeError, ValueError) as error:
            if "streamer" not in kwargs:
                raise
            # The server writes it between quotes, as it is.
            raise RuntimeError(json.dumps(f"The server failed: {error}")[1:-1]) from error


class AMVLChatHandler(ChatCompletionHandler):
    """
    Answers `/v1/chat/completions`: reads the request, and hands the model on as this request asks it.

    Args:
        latent_temperature (`float`, *optional*): where a request says none; the checkpoint's by default.
        **settings: of the stock handler.
    """

    _valid_params_class = None  # `read_request` looks at the fields
    _unused_fields = frozenset()

    def __init__(self, latent_temperature=None, **settings):
        self.latent_temperature = latent_temperature
        # Texts of a client that look like tokens of the template, an image's or the latents', stay texts.
        super().__init__(**settings, chat_template_kwargs={"sanitize_control_tokens": True})

    async def handle_request(self, body, request_id):
        try:
            request = (await asyncio.to_thread(read_request, body)).model_dump(exclude_none=True)
            return await super().handle_request({"latent_temperature": self.latent_temperature} | request, request_id)
        except (ValueError, TemplateError) as error:  # templates raise on turns in an order that they do not know
            raise HTTPException(400, str(error)) from error
        except HTTPException:
            raise
        except Exception as error:
            logger.exception("A request failed.")
            raise HTTPException(
                500, f"The server failed with a `{type(error).__name__}`, its log says more."
            ) from error

    def _resolve_model(self, body):
        model_id, model, processor = super()._resolve_model(body)
        asked = AskedModel(model, processor.tokenizer, dict(body))
        body.pop("seed", None)  # the stock handler would set it at once, for whatever is being generated
        return model_id, asked, processor

    def _streaming(self, request_id, model, processor, model_id, inputs, gen_config, **settings):
        model.settle(inputs, gen_config)
        return super()._streaming(request_id, model, processor, model_id, inputs, gen_config, **settings)

    async def _non_streaming(self, request_id, model, processor, model_id, inputs, gen_config, **settings):
        model.settle(inputs, gen_config)
        return await super()._non_streaming(request_id, model, processor, model_id, inputs, gen_config, **settings)


def refuse_other_checkpoint(checkpoint, revision=None):
    """Raises where a checkpoint's configuration is not ours; reads no weights."""
    try:
        config, why = PreTrainedConfig.get_config_dict(checkpoint, revision=revision)[0], "it names no `model_type`."
    except (OSError, ValueError) as error:
        config, why = {}, str(error)
    if (model_type := config.get("model_type")) is None:
        raise ValueError(
            f"`checkpoint` ({checkpoint}) has no configuration that can be read: {why} Give a folder or Hub id that a run of "
            "recipes/sft_amvl.py wrote."
        )
    if model_type != AMVLConfig.model_type:
        raise ValueError(
            f"`checkpoint` ({checkpoint}) is a stock model, `{model_type}`, and has no latents: train it with "
            "recipes/sft_amvl.py, or serve it as it is with `transformers serve`."
        )


def refuse_untrained(model, checkpoint):
    """Raises where prior and posterior are still the one map that `from_backbone` starts them as."""
    posterior = model.posterior_head.state_dict()
    if all(torch.equal(weight, posterior[name]) for name, weight in model.prior_head.state_dict().items()):
        raise ValueError(
            f"`checkpoint` ({checkpoint}) is untrained: its prior is still what `from_backbone` made, and its latents mean nothing. "
            "Train it with recipes/sft_amvl.py, or serve the stock model with `transformers serve`."
        )


def refuse_other_server():
    """Raises where `transformers.cli.serving` no longer has what is overridden here, which would then be skipped."""
    for ours in (AMVLModelManager, AMVLChatHandler):
        stock = ours.__mro__[1]
        gone = [name for name in vars(ours) if not name.startswith("__") and not hasattr(stock, name)]
        if gone:
            raise ImportError(
                f"`{stock.__name__}` of this release of transformers has no {', '.join(f'`{name}`' for name in gone)}: its server "
                "has changed. Install `transformers>=5.23,<5.25`."
            )


def error_body(message, status):
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = message.encode("utf-8", "replace").decode()  # it may quote what JSON can hold and UTF-8 cannot
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status_code=status)


def limit_bodies(app, max_bytes):
    """Wraps an ASGI `app`, which reads a body as a whole, so that a longer one is refused with 413 and not read on."""

    async def limited(scope, receive, send):
        if scope["type"] != "http":
            return await app(scope, receive, send)
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > max_bytes:
                text = f"The request is longer than {max_bytes} bytes: send fewer or smaller images."
                return await error_body(text, 413)(scope, receive, send)
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replayed():
            return whole.pop() if whole else await receive()

        await app(scope, replayed, send)

    return limited


def bound_socket(host, port):
    """A socket at an address that is free; it does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise OSError(
            f"`port` {port} of `host` {host!r} cannot be had: {error.strerror}. Stop what listens there, or choose another port; "
            "0 takes a free one."
        ) from error
    return listener


def announcement(health, listener):
    """What the server says before it listens."""
    host, port = listener.getsockname()[:2]
    changes = health["log_prob_change"]
    return (
        f"{health['model']}: `{health['class']}` around `{health['backbone']}`, revision {health['revision'] or 'none, a folder'}\n"
        f"Latents are on: k = {health['num_latents']}, d = {health['latent_size']}, temperature {health['latent_temperature']}. "
        f"With others the next token's log-probability changes by {changes['other_latents']:.3g} nats, without by "
        f"{changes['no_latents']:.3g}, with the same by {changes['same_latents']:.3g}.\n"
        f"http://{f'[{host}]' if ':' in host else host}:{port}/v1/chat/completions; the proof again: /health/latents"
    )


def build_app(manager, latent_temperature=None):
    """
    transformers' FastAPI application for the model of `manager`, with a route that proves the latents.

    Args:
        manager ([`AMVLModelManager`]): has loaded the model.
        latent_temperature (`float`, *optional*): of answers, where the request says none; the checkpoint's by default.

    Returns:
        `tuple`: the `FastAPI` application, and the coroutine function behind `/health/latents`, which returns its
        status code and body.

    Raises:
        ImportError: a server of another shape than the one that this was written for.
    """
    refuse_other_server()
    name = manager.force_model
    state = GenerationState()
    handler = AMVLChatHandler(latent_temperature, model_manager=manager, generation_state=state)
    other_handlers = {
        parameter: None
        for parameter in inspect.signature(build_server).parameters
        if parameter.endswith("_handler") and parameter != "chat_handler"
    }
    app = build_server(manager, handler, generation_state=state, **other_handlers)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in KEPT_ROUTES]
    if {route.path for route in app.router.routes} != KEPT_ROUTES:
        raise ImportError(
            f"transformers' server no longer has {sorted(KEPT_ROUTES)}: install `transformers>=5.23,<5.25`."
        )
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "amvl"}

    async def latents_health():
        model, processor = manager.load_model_and_processor(name)
        temperature = model.config.latent_temperature if latent_temperature is None else latent_temperature
        body = {
            "model": name,
            "class": type(model).__name__,
            "backbone": type(model.backbone).__name__,
            "revision": model.base_commit,
            "num_latents": model.config.num_latents,
            "latent_size": model.config.latent_size,
            "latent_temperature": temperature,
        }
        try:
            proof = await state.get_manager(name).async_submit(prove_latents, model, processor)
        except Exception as error:  # whatever it is, nothing is proved
            proof = {"are_on": False, "reason": f"{type(error).__name__}: {error}"}
        are_on = proof.pop("are_on")
        return (200 if are_on else 503), {"latents": "on" if are_on else "off"} | body | proof

    @app.get("/health/latents")
    async def health_of_latents():
        status, body = await latents_health()
        return JSONResponse(body, status_code=status)

    @app.get("/v1/models")
    def list_models():
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model_id:path}")
    def retrieve_model(model_id: str):
        if model_id != name:
            raise HTTPException(404, f"There is no model `{model_id}` here: `{name}` is served.")
        return card

    @app.exception_handler(StarletteHTTPException)
    async def refuse(request, error):
        message = error.detail
        if error.status_code in (404, 405) and message in ("Not Found", "Method Not Allowed"):
            known = ", ".join(f"{'/'.join(sorted(route.methods))} {route.path}" for route in app.router.routes)
            message = f"`{request.method} {request.url.path}` is not served here. These are: {known}."
        return error_body(message, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request, error):
        problem = error.errors()[0]
        return error_body(f"The body must be a JSON object: {problem['msg']}.", 422)

    return app, latents_health


def serve(
    checkpoint,
    host="127.0.0.1",
    port=8000,
    device="auto",
    dtype="auto",
    revision=None,
    attn_implementation=None,
    latent_temperature=None,
    max_request_mib=32,
):
    """
    Serves a checkpoint until SIGTERM or Ctrl-C.

    Args:
        checkpoint (`str`): an AMVL checkpoint, folder or Hub id; its name for clients is the id, or the folder's own name.
        host (`str`, defaults to `"127.0.0.1"`): address to listen at.
        port (`int`, defaults to 8000): port to listen at; 0 takes a free one.
        device (`str`, defaults to `"auto"`), dtype (`str`, defaults to `"auto"`): as `transformers serve` has them.
        revision (`str`, *optional*): of a Hub id.
        attn_implementation (`str`, *optional*): `"sdpa"`, say.
        latent_temperature (`float`, *optional*): where a request says none; the checkpoint's by default.
        max_request_mib (`float`, defaults to 32): most MiB of a request, its images in base64.

    Raises:
        ValueError: a setting out of range, a checkpoint that is not ours or untrained, latents that do not reach the decoder.
        OSError: the port is taken, or the checkpoint is not there.
    """
    if latent_temperature is not None and not 0 <= latent_temperature <= MAX_LATENT_TEMPERATURE:
        raise ValueError(f"`latent_temperature` must be from 0 to {MAX_LATENT_TEMPERATURE}, got {latent_temperature}.")
    if not max_request_mib > 0:
        raise ValueError(f"`max_request_mib` must be above 0, got {max_request_mib}.")
    if not 0 <= port < 2**16:
        raise ValueError(f"`port` must be from 0 to 65535, got {port}.")
    refuse_other_checkpoint(checkpoint, revision)
    with bound_socket(host, port) as listener:  # before the model is loaded, which takes minutes
        manager = AMVLModelManager(
            checkpoint, revision, device=device, dtype=dtype, attn_implementation=attn_implementation
        )
        app, latents_health = build_app(manager, latent_temperature)
        status, health = asyncio.run(latents_health())
        if status != 200:
            raise ValueError(
                f"`checkpoint` ({checkpoint}) answers alike whatever its latents are: {health}. Look into it with "
                "recipes/diagnose_amvl.py, or serve its backbone with `transformers serve`."
            )
        print(announcement(health, listener), flush=True)
        app = limit_bodies(app, int(max_request_mib * 2**20))
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when all is closed
            uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=SECONDS_TO_STOP)).run(sockets=[listener])
