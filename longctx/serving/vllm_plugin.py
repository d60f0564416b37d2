"""What vLLM finds by the entry point "longctx": the model class of saved ALiBi checkpoints.

`longctx.save` names an architecture that no engine knows where a config cannot say a method. In an
environment with vLLM and longctx, vLLM knows the one of a LLaMA under ALiBi by this.
"""

__all__ = ["ARCHITECTURE", "register"]

ARCHITECTURE = "LongctxAlibiLlamaForCausalLM"


def register() -> None:
    """Tell vLLM of the class, which it imports only when a checkpoint names it."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(
            ARCHITECTURE, "longctx.serving.vllm_alibi:AlibiLlamaForCausalLM"
        )
