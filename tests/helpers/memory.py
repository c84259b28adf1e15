"""The most memory that something allocates on the CPU."""

import gc

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run):
    """Bytes that were allocated at most during `run()`, beyond what was before."""
    gc.collect()  # models of before, freed meanwhile, would be subtracted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak
