"""Define the one exception that means "compilation cannot honour the request"."""


class LipassError(RuntimeError):
    """Report a request that cannot be honoured, in the form rule, value, remedy.

    Wrong arguments raise `ValueError` or `TypeError`; this class is for requests that are well
    formed and still cannot be met, such as a site that stays dense under `strict=True`.
    """
