"""`uv pip install` with pip's arguments and pip's configuration (files and PIP_ variables).

uv does not read that configuration by itself.
"""

import os
import sys

from pip._internal.commands import create_command

pip, requirements = create_command("install").parse_args(sys.argv[1:])
settings = {
    "UV_DEFAULT_INDEX": pip.index_url,
    "UV_INDEX": " ".join(pip.extra_index_urls),
    "UV_INDEX_STRATEGY": "unsafe-best-match",  # pip's rule: the best version of all indexes
    "UV_FIND_LINKS": ",".join(pip.find_links),
    "UV_CONSTRAINT": " ".join(pip.constraints),
    "UV_INSECURE_HOST": " ".join(pip.trusted_hosts),
    "UV_HTTP_TIMEOUT": str(int(max(pip.timeout, 60))),
    "SSL_CERT_FILE": pip.cert,
    "SSL_CLIENT_CERT": pip.client_cert,
    "HTTPS_PROXY": pip.proxy,
}
for name, value in settings.items():
    if value:
        os.environ.setdefault(name, value)
options = ["--no-index"] if pip.no_index else []
options += [word for path in pip.editables for word in ("-e", path)]
uv = os.path.join(os.path.dirname(sys.executable), "uv")
os.execv(uv, [uv, "pip", "install", "--python", sys.executable, *options, *requirements])
