"""Define what means "this request cannot be honoured": an exception, and a warning short of it."""


class LipassError(RuntimeError):
    """Report a request that cannot be honoured, in the form rule, value, remedy.

    Wrong arguments raise `ValueError` or `TypeError`; this class is for requests that are well
    formed and still cannot be met, such as a site that stays dense under `strict=True`.
    """


class LipassWarning(UserWarning):
    """Tell that something that was asked for does not happen, in the form rule, value, remedy.

    Under `strict=True` most of what is warned of raises `LipassError`.
    """
