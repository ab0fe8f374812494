"""``ts.protocol.otf_message_handler``."""

from torchmgmt.compat.ts.handler_utils.utils import send_intermediate_predict_response

__all__ = ["send_intermediate_predict_response"]
