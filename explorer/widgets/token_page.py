"""The page that asks for the token, in the look of the app: Jupyter's own speaks of commands and passwords that the app does not have.

Named by `identity_provider_class` in `jupyter/config/voila.json`; of use only where the app was started with `--token`.
"""

from __future__ import annotations

from typing import Any

from jupyter_server.auth.identity import PasswordIdentityProvider
from jupyter_server.auth.login import LoginFormHandler


class TokenPage(LoginFormHandler):
    """Asks for the token, with `login.html` among our templates."""

    def get_template(self, name: str) -> Any:
        """Return the template of that name from the templates of the page, not from those of Jupyter's server."""
        return self.settings["voila_jinja2_env"].get_template(name)


class TokenIdentity(PasswordIdentityProvider):
    """Lets in who brings the token, in the address or on the page that asks for it."""

    def get_handlers(self) -> list[tuple[str, object]]:
        """Return the page that asks for the token."""
        return [(r"/login", TokenPage)] if self.auth_enabled else []
