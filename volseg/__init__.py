"""volseg: instance labels for electron-microscopy volumes of any size. Start reading at `volseg.engine.pipeline`."""

__version__ = "0.1.0"
