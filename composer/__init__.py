"""The composer: base + adapters in, a deployable artefact out. It knows no database, no web and no command line.

recipe  ->  plan  ->  run  ->  sink  ->  exporters
intent      headers   bytes    commit    ONNX
"""
