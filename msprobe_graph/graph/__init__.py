"""Graph mode: sees inside compiled code.

::

    dynamo's graph -> marks, naming -> plan (calls, values) -> stamps -> handoff -> inner backend, with taps
                                                                                        |
    dump <- recorder <- entries <- run <- region, tap operator <- compiled program <-------'

`lower` is the way down, `region` the run time.
"""
