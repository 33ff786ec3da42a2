"""What every compiled model does, whatever its class: compile, save, load and run its parts."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, TypeVar

import torch
from torch import Tensor

from .. import hub
from ..config import CONFIG_NAME, RBLNModelConfig, override, reject_unknown
from ..errors import RBLNRuntimeError
from ..profiler import Profile
from ..targets.base import OnRows, Runtime, RuntimeOptions, get_target
from ..targets.placement import check_placement
from ..targets.watch import Progress, ShouldStop
from .cache import Cache
from .compiling import CompiledModel, compile_model
from .family import ENCODER, Family, right_class
from .latents import LatentScaling
from .module_members import ModuleMembers
from .storage import load_model, save_model

if TYPE_CHECKING:
    from typing_extensions import Unpack

ModelType = TypeVar("ModelType", bound="RBLNModel")
Config = RBLNModelConfig | Mapping[str, Any] | None


class RunArguments(TypedDict, total=False):
    """What every call that runs a model takes by name, such as `encode` and `decode`.

    Attributes:
        should_stop: A function without arguments that is asked during the run, at most every
            50 ms and on the calling thread; a true answer stops the run. By default the run is
            not stopped.
        progress: A function that is told as often how far the run is, within an image, too. It
            gets the work that is done and all of it, in thousandths of an image: `(250, 1000)`
            is a quarter of one image, by an estimate of the time. The last call says that all
            is done. What the function raises ends the run and passes through. The target
            `rbln` calls it before and after the run only. By default nothing is called.
        memory_limit: The most memory of this run besides the weights, in bytes or as
            `"2GiB"`. The smaller of this limit and that of the model holds. It changes no bit
            of the result. The target `rbln` ignores it. By default that of the model.

    Example:
        >>> with tqdm.tqdm() as bar:  # doctest: +SKIP
        ...     def progress(done: int, total: int) -> None:
        ...         bar.total = total
        ...         bar.update(done - bar.n)
        ...
        ...     vae.decode(latent, progress=progress, memory_limit="1GiB")
    """

    should_stop: ShouldStop | None
    progress: Progress | None
    memory_limit: int | str | None


class RBLNModel(ModuleMembers):
    """A compiled model: its parts, its configurations and their runtimes.

    Made by `from_pretrained` or `from_model`, not by its constructor.

    Attributes:
        rbln_config: What the model was compiled for and how it runs, frozen.
        resolved_config: What it was compiled for, with nothing left open.
        compiled_models: The compiled parts by name.
    """

    config_class: ClassVar[type[RBLNModelConfig]]
    family: ClassVar[Family]
    """What is special to the diffusers class that is compiled."""

    def __init__(self, compiled: CompiledModel) -> None:
        self._config = dict(compiled.config)
        self._shown_config: Mapping[str, Any] | None = None
        self.rbln_config = compiled.rbln_config
        self.resolved_config = compiled.resolved_config
        self.compiled_models = dict(compiled.parts)
        self._compiled = compiled
        self._target = get_target(self.resolved_config.target)
        self._runtimes = self._new_runtimes()

    @property
    def config(self) -> Any:
        """The configuration of the original model, as diffusers gives it."""
        if self._shown_config is None:
            # Here rather than at once: importing diffusers takes longer than loading a model.
            from diffusers.configuration_utils import FrozenDict

            self._shown_config = FrozenDict(self._config)  # type: ignore[no-untyped-call]
        return self._shown_config

    # Making one

    @classmethod
    def from_pretrained(
        cls: type[ModelType],
        model_id: str | os.PathLike[str],
        export: bool | None = False,
        rbln_config: Config = None,
        **kwargs: Any,
    ) -> ModelType:
        """Load a compiled model, or compile one of diffusers.

        What was compiled is kept in a cache on disk, and taken from there the next time; see
        docs/pipelines.md.

        Args:
            model_id: A hub id or a local directory, of a compiled model or of a diffusers
                model; or a `.safetensors` file of a VAE or of a whole checkpoint, in the
                layout of diffusers or of the model's authors.
            export: `True` compiles a diffusers model, `False` loads a compiled one, `None`
                decides by what it finds.
            rbln_config: Options, as a dict or an instance of the configuration class.
            **kwargs: Names that begin with `rbln_` are options and win over `rbln_config`.
                The rest goes to the Hugging Face loader: `subfolder`, `revision`, `token`,
                `cache_dir`, `force_download`, `local_files_only`, `torch_dtype`, …
                A `.safetensors` file is opened without the network; what its weights don't
                tell, such as the scaling of latents, follows from `kind` (`"sd"`, `"sdxl"`,
                `"sd3"`, `"flux"`, `"flux2"`, `"qwen-image"`, `"wan"`, …) or from `config`, a
                dict or the directory of a `config.json`. By default it is unknown, and what
                needs it raises an error.

        Returns:
            A model ready to run.

        Raises:
            TypeError: A name is unknown.
            ValueError: `export` doesn't fit what was found, or an option is wrong or not
                the one that the model was compiled for.
            OSError: There is no such model.
            RBLNCompileError: The model can't be compiled.
            RBLNArtifactError: The compiled model is damaged or incomplete.
            RBLNTargetUnavailableError: This machine can't run the target.

        Example:
            >>> vae = RBLNAutoencoderKL.from_pretrained(
            ...     "stabilityai/sdxl-vae", export=True, rbln_sample_size=1024
            ... )  # doctest: +SKIP
        """
        options, loader = split_options(kwargs)
        wanted = cls.configuration(rbln_config, options)
        name = os.fspath(model_id)
        loader = hub.reach(name, loader)
        compiled_directory = hub.find_compiled(name, **hub.options(loader))
        if compiled_directory is not None:
            if export:
                raise ValueError(
                    f"{model_id} is compiled already, and export=True compiles a diffusers model. "
                    "Leave export out to load it."
                )
            hub.check_loader_options(loader)
            hub.reject_kind(name, loader)
            return cls(load_model(cls.family, compiled_directory, wanted))
        if export is False:
            raise ValueError(
                f"{model_id} is not a compiled model: it has no {CONFIG_NAME}. Pass export=True to "
                "compile it."
            )
        model = cls.family.load_original(name, **loader)
        return cls(compile_model(cls.family, model, wanted, name, Cache.of_user()))

    @classmethod
    def from_model(
        cls: type[ModelType],
        model: torch.nn.Module,
        *,
        rbln_config: Config = None,
        cache: bool = False,
        **kwargs: Any,
    ) -> ModelType:
        """Compile a loaded model.

        Args:
            model: The diffusers model, which is not needed afterwards. It is not changed,
                not even meanwhile, so other threads may run it.
            rbln_config: Options, as a dict or an instance of the configuration class.
            cache: Whether the result is kept on disk and taken from there the next time, as
                `from_pretrained` does; see docs/pipelines.md. By default `False`.
            **kwargs: Options with the prefix `rbln_`, which win over `rbln_config`.

        Returns:
            A model ready to run.

        Raises:
            TypeError: The model is of another class, or a name is unknown.
            ValueError: An option is wrong or in conflict with the model.
            RBLNCompileError: The model can't be compiled, or its weights are offloaded.
            RBLNTargetUnavailableError: This machine can't run the target.

        Example:
            >>> vae = RBLNAutoencoderKL.from_model(pipe.vae, rbln_dtype="bfloat16")
            ... # doctest: +SKIP
        """
        options, rest = split_options(kwargs)
        reject_unknown(rest, ["rbln_config", "cache"], f"argument of {cls.__name__}.from_model")
        original = cls.family.original_class_name
        if type(model).__name__ != original:
            raise TypeError(
                f"{cls.__name__} compiles {original}, and got {type(model).__name__}. "
                f"{right_class(type(model).__name__)}"
            )
        name = str(getattr(model, "name_or_path", "") or original)
        wanted = cls.configuration(rbln_config, options)
        kept = Cache.of_user() if cache else None
        return cls(compile_model(cls.family, model, wanted, name, kept))

    @classmethod
    def configuration(cls, rbln_config: Config, options: Mapping[str, Any]) -> RBLNModelConfig:
        """The configuration that a caller asks for, not frozen.

        Args:
            rbln_config: Options, as a dict or an instance of the configuration class.
            options: Those that win over it.

        Raises:
            ValueError, TypeError: An option is unknown or wrong.
        """
        if rbln_config is None or isinstance(rbln_config, Mapping):
            return cls.config_class(**override(rbln_config or {}, options))
        if not isinstance(rbln_config, cls.config_class):
            raise TypeError(
                f"rbln_config must be a dict or a {cls.config_class.__name__}, and is a "
                f"{type(rbln_config).__name__}."
            )
        return rbln_config.copy(**options)

    # Keeping one

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the compiled model; `from_pretrained` needs nothing else.

        `config.json`, `rbln_config.json` and one `NAME.rbln` for each part replace those that
        the directory holds; its other files are kept. A crash leaves the old model, the new
        one, or a directory that `from_pretrained` refuses as incomplete.

        Args:
            save_directory: Made where missing.

        Raises:
            RBLNArtifactError: It can't be written.
            NotADirectoryError: It is a file.
        """
        model = dataclasses.replace(self._compiled, config=self._config)
        save_model(Path(save_directory), self.family, model)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload compiled model",
        create_pr: bool = False,
    ) -> str:
        """Upload the compiled model to the Hugging Face Hub.

        Args:
            repo_id: `"user/name"`; made where missing.
            private: Whether a new repository is private.
            token: The access token; `None` takes the one that is logged in.
            revision: The branch to upload to.
            commit_message: What the commit says.
            create_pr: Open a pull request instead of committing.

        Returns:
            The address of the commit or pull request.
        """
        with TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return hub.upload(
                Path(directory),
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    # Running one

    def memory_needed(self, part: str, shape: tuple[int, ...]) -> int:
        """Bytes that a run takes besides the weights.

        These are activations, scratch memory of its threads, what is kept for the next run, and
        the result.

        Args:
            part: The name of a compiled part.
            shape: `(N, C, H, W)` of its input; `(N, C, T, H, W)` stands for `decode_frames` or
                `encode_frames` of videos, which take the same for any `T`: state, activations
                and the frames of one run.

        Raises:
            RBLNRuntimeError: There is no such part, or there are no runtimes.
            ValueError: The part takes no such input.
            MemoryError: It needs more than `memory_limit`, however it is run.

        Example:
            >>> vae.memory_needed("decoder", (1, 4, 64, 64))  # doctest: +SKIP
        """
        return self._runtime(part, tuple(shape)).memory_needed(tuple(shape))

    def seconds_expected(self, part: str, shape: tuple[int, ...]) -> float | None:
        """About how long a run takes if the machine does nothing else.

        It is derived from the work of the run, and known on the target `cpu` only.

        Args:
            part: The name of a compiled part.
            shape: `(N, C, H, W)` of its input.

        Returns:
            Seconds, or `None` if it isn't known.

        Raises:
            RBLNRuntimeError, ValueError, MemoryError: As `memory_needed`.

        Example:
            >>> vae.seconds_expected("decoder", (1, 4, 64, 64))  # doctest: +SKIP
        """
        return self._runtime(part, tuple(shape)).seconds_expected(tuple(shape))

    def describe(self, part: str, shape: tuple[int, ...], *, steps: bool = False) -> str:
        """What a run takes in memory and work, and on the target `cpu` what less would cost.

        Args:
            part: The name of a compiled part.
            shape: `(N, C, H, W)` of its input.
            steps: Whether to list the steps of the run, too.

        Raises:
            RBLNRuntimeError: There is no such part, or there are no runtimes.
            ValueError: The part takes no such input.
            MemoryError: It needs more than `memory_limit`, however it is run.

        Example:
            >>> print(vae.describe("decoder", (1, 4, 512, 512)))  # doctest: +SKIP
        """
        return self._runtime(part, tuple(shape)).describe(tuple(shape), steps=steps)

    @property
    def exact_batches(self) -> bool:
        """Whether each sample of a batch gets the same bits as in a run of its own."""
        return self._target.exact_batches

    @property
    def static_shapes(self) -> bool:
        """Whether the model takes only the shape that it was compiled for."""
        return self._target.static_shapes

    def _runtime(self, part: str, shape: tuple[int, ...]) -> Runtime:
        """What runs a part on inputs of a shape.

        Raises:
            RBLNRuntimeError: There is no such part, or there are no runtimes.
            ValueError: The target takes only another shape.
        """
        if not self._runtimes:
            raise RBLNRuntimeError(
                "This model was compiled with create_runtimes=False, so it can't run. Save it with "
                "save_pretrained(DIRECTORY) and load it with from_pretrained(DIRECTORY) on a "
                f"machine that has the target {self.rbln_config.target!r}."
            )
        if part not in self._runtimes:
            raise RBLNRuntimeError(
                f"This model has no {part}, only {', '.join(self._runtimes)}. Compile it again "
                "with that part."
            )
        if self.static_shapes:
            compiled_shape = self.resolved_config.input_shapes()[part]
            if shape != compiled_shape:
                raise ValueError(
                    f"The {part} was compiled for the shape {compiled_shape}, and got {shape}. The "
                    f"target {self._target.name!r} takes no other: compile the model again with "
                    "rbln_batch_size and rbln_sample_size."
                )
        return self._runtimes[part]

    def _run(
        self,
        part: str,
        image: Tensor,
        out: Tensor | None = None,
        *,
        levels: bool = False,
        finite: Tensor | None = None,
        on_rows: OnRows | None = None,
        **arguments: Unpack[RunArguments],
    ) -> Tensor:
        """Run a part on a checked image, as `Runtime.run`; a new result is on its device."""
        method = "encode" if part == ENCODER else "decode"
        reject_unknown(arguments, RunArguments.__annotations__, f"argument of {method}")
        should_stop, progress = arguments.get("should_stop"), arguments.get("progress")
        functions: dict[str, Callable[..., object] | None]
        functions = {"should_stop": should_stop, "progress": progress, "on_rows": on_rows}
        for name, function in functions.items():
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function, and is a {type(function).__name__}.")
        if out is not None and not self._target.any_device and out.device.type != "cpu":
            raise ValueError(
                f"out is on {out.device}, and the target {self._target.name!r} writes to the CPU "
                "alone. Give a tensor there."
            )
        runtime = self._runtime(part, tuple(image.shape))
        source = image.detach() if self._target.any_device else image.detach().cpu()
        result = runtime.run(
            source,
            out,
            should_stop,
            progress=progress,
            memory_limit=RBLNModelConfig.memory_limit.checked(arguments.get("memory_limit")),
            levels=levels,
            finite=finite,
            on_rows=on_rows,
        )
        return result.to(image.device) if out is None else result

    def profile(self) -> Profile:
        """The latest runs, operation by operation.

        Raises:
            RBLNRuntimeError: The model was loaded without `activate_profiler=True`.

        Example:
            >>> vae = RBLNAutoencoderKL.from_pretrained(
            ...     "compiled-vae", rbln_activate_profiler=True
            ... )  # doctest: +SKIP
            >>> vae.decode(latent); print(vae.profile())  # doctest: +SKIP
        """
        if not self.rbln_config.activate_profiler:
            raise RBLNRuntimeError(
                "The profiler is not active. Load the model with rbln_activate_profiler=True."
            )
        runs = [run for runtime in self._runtimes.values() for run in runtime.profiles]
        return Profile(sorted(runs, key=lambda run: run.start))

    @property
    def device(self) -> torch.device:
        """Where tensors come from and go to: the GPU that the model is on, or the CPU."""
        return torch.device(self._devices()[0] if self._target.any_device else "cpu")

    @property
    def latent_scaling(self) -> LatentScaling:
        """How pipelines scale the latents of the model for their denoiser, and back."""
        return self.family.latent_scaling(self._config, self._compiled.buffers)

    @property
    def usable_memory(self) -> int:
        """Bytes that runs may take on the device of the model; the least, if it has several."""
        return min(map(self._target.usable_memory, self._devices()))

    def with_runtimes(self: ModelType, **options: Any) -> ModelType:
        """The same compiled model, ready to run in another way.

        Args:
            **options: Options of a run, such as `memory_limit` and `num_threads`.

        Returns:
            A model that shares its weights with this one.

        Raises:
            ValueError, TypeError: An option is none of a run, or wrong.
            RBLNTargetUnavailableError: This machine can't run the target.

        Example:
            >>> small = vae.with_runtimes(memory_limit="1GiB")  # doctest: +SKIP
        """
        reject_unknown(options, RBLNModelConfig.options_of_run(), "option of a run", ValueError)
        rbln_config = self.rbln_config.copy(**{"create_runtimes": True, **options})
        resolved = self.resolved_config
        check_placement(rbln_config, self._target, resolved.parts)
        rbln_config.freeze()
        return type(self)(
            dataclasses.replace(self._compiled, config=self._config, rbln_config=rbln_config)
        )

    def __deepcopy__(self: ModelType, memo: dict[int, Any]) -> ModelType:
        """A model with runtimes and a configuration of its own, which shares the weights."""
        copied = copy.copy(self)
        copied._config = copy.deepcopy(self._config, memo)
        copied._shown_config = copy.deepcopy(self._shown_config, memo)
        copied._runtimes = self._new_runtimes()
        return copied

    def _new_runtimes(self) -> dict[str, Runtime]:
        if not self.rbln_config.create_runtimes:
            return {}
        _prepare_forks()
        return {
            part: self._target.create_runtime(model, self._runtime_options(part))
            for part, model in self.compiled_models.items()
        }

    def _devices(self) -> list[int | str]:
        devices = map(self._device_of, self.compiled_models)
        own = self._target.default_device()
        return list(dict.fromkeys(own if device is None else device for device in devices))

    def _device_of(self, part: str) -> int | str | None:
        return (self.rbln_config.device_map or {}).get(part, self.rbln_config.device)

    def _runtime_options(self, part: str) -> RuntimeOptions:
        config, device = self.rbln_config, self._device_of(part)
        limit = config.memory_limit
        if limit is None:
            limit = self._target.usable_memory(
                self._target.default_device() if device is None else device
            )
        return RuntimeOptions(
            dtype=self.resolved_config.dtype_of(part),
            device=device,
            num_threads=config.num_threads,
            memory_limit=limit,
            timeout=config.timeout,
            activate_profiler=config.activate_profiler,
        )

    def register_to_config(self, **options: Any) -> None:
        """Change the configuration, as pipelines do that correct an old `scaling_factor`.

        Args:
            **options: Keys of `config` and their new values; none changes what is compiled.
        """
        self._config = {**self._config, **options}
        self._shown_config = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rbln_config!r})"


@functools.cache
def _prepare_forks() -> None:
    """Let torch work on one thread in forked children.

    Its other threads don't exist there, and it would wait for them for ever.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


def split_options(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that begin with `rbln_`, without it, and the others."""
    prefix = "rbln_"
    options = {k.removeprefix(prefix): v for k, v in kwargs.items() if k.startswith(prefix)}
    return options, {k: v for k, v in kwargs.items() if not k.startswith(prefix)}
