"""`double_seq_bn` of `adapters`: h + W_up g(W_down h), behind attention and feed-forward; ours is `houlsby` without
trained norms."""

from __future__ import annotations

from trimtab.methods import Houlsby
from trimtab.peers.adapters.bottleneck import bottleneck_state, common_fields, take_bottlenecks, write_bottlenecks
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Found, Kind, Model, Written


def read(folder: Folder, place: Model) -> Found:
    """A branch without tensors keeps its start, which changes nothing."""
    branches = ("attention", "feedforward", "cross")
    taken = [one.scaled() for one in take_bottlenecks(folder, place, branches, "houlsby")]
    cross = any(one.site.branch == "cross" for one in taken)
    method = Houlsby(**common_fields(folder, taken, place.sites), norms=False, cross=cross)
    return Found(method, bottleneck_state(taken, method.size))


def write(form: Acting) -> Written:
    """Raises UserError where norms were trained."""
    own = {"original_ln_before": False, "is_parallel": False, "scaling": 1.0}
    return write_bottlenecks(form, form.method.activation, own)


KIND = Kind("double_seq_bn", ("houlsby",), read, write)
