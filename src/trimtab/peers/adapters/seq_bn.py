"""`seq_bn` of `adapters`: A = f + W_up g(W_down LN(f + x)), behind feed-forward; ours is `pfeiffer`."""

from __future__ import annotations

from trimtab.errors import UserError
from trimtab.methods import Pfeiffer
from trimtab.peers.adapters.bottleneck import bottleneck_state, common_fields, take_bottlenecks, write_bottlenecks
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Found, Kind, Model, Written


def read(folder: Folder, place: Model) -> Found:
    """Raises UserError for adapters behind attention, and a residual connection that starts behind the norm."""
    if folder.config.get("residual_before_ln", True) is not True:
        raise UserError(f"{folder.path}: residual_before_ln is not true, which trimtab's pfeiffer has not")
    taken = [one.scaled() for one in take_bottlenecks(folder, place, ("feedforward",), "pfeiffer")]
    method = Pfeiffer(**common_fields(folder, taken, place.sites))
    return Found(method, bottleneck_state(taken, method.size or 0))


def write(form: Acting) -> Written:
    """Every layer's bottleneck."""
    own = {"original_ln_before": True, "is_parallel": False, "scaling": 1.0}
    return write_bottlenecks(form, form.method.activation, own)


KIND = Kind("seq_bn", ("pfeiffer",), read, write)
