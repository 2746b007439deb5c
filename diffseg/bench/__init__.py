"""The benchmark harness behind ``diffseg bench`` and ``pytest benchmarks/`` (benchmarks/README.md says how to read it).

``rows`` lists what to measure, ``suite`` and ``networks`` make each row ready, ``cases`` makes their inputs, ``peers``
holds what the ops are compared with, ``gates`` checks every result before it is timed, ``timing`` times, ``passes``
repeats it in fresh processes, ``spread`` says how far another run may differ and ``compare`` whether it does, ``cost``
and ``ceilings`` say what would be possible, ``report`` and ``plot`` show it. Nothing is downloaded.
"""
