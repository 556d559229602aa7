"""Views, instructions and robot states in, model inputs out; model outputs back to robot units."""

__all__ = [
    "DepthVLAProcessor",
    "StereoImageProcessorPil",
    "StereoProcessor",
    "ViewImageProcessorPil",
    "build_tokenizer",
]


def __getattr__(name: str):
    """The classes when they are asked for: who records or reads data needs the arithmetic in the files beside them, and
    torch and transformers would take three seconds of every process that does.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .image_processing_stereovla import StereoImageProcessorPil, ViewImageProcessorPil
    from .processing_depthvla import DepthVLAProcessor
    from .processing_stereovla import StereoProcessor
    from .text_tokenizer import build_tokenizer

    # Makes save_pretrained write auto_map and copy the code. This file itself is not part of a saved folder.
    StereoImageProcessorPil.register_for_auto_class("AutoImageProcessor")
    ViewImageProcessorPil.register_for_auto_class("AutoImageProcessor")
    StereoProcessor.register_for_auto_class("AutoProcessor")
    DepthVLAProcessor.register_for_auto_class("AutoProcessor")
    processors = (DepthVLAProcessor, StereoImageProcessorPil, StereoProcessor, ViewImageProcessorPil)
    found = {item.__name__: item for item in (*processors, build_tokenizer)}
    globals().update(found)
    return found[name]
