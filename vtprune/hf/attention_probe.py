from .. import tap

HEADS, probe, probe_change, reweighed = tap.HEADS, tap.attach, tap.attach_change, tap.reweighed  # TEMPORARY
