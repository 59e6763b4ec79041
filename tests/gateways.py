"""What other people put before their servers: keys, certificates, redirects, raw answers."""

import datetime
import ipaddress
import socket
import ssl
import threading
from contextlib import contextmanager

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def demands(authorization, *, prefixes=("/",), seen=None):
    """A middleware that answers 401 to requests without this Authorization, and echoes what it got."""

    @web.middleware
    async def check(request, handler):
        given = request.headers.get("Authorization")
        if seen is not None:
            seen.append(given)
        if request.path.startswith(prefixes) and given != authorization:
            return web.json_response({"error": f"Unauthorized: {given}"}, status=401)
        return await handler(request)

    return check


def redirects(target, *, status=307, seen=None):
    """A middleware that sends everybody to ``target`` of the path that was asked for."""

    @web.middleware
    async def send(request, handler):
        if seen is not None:
            seen.append(request.headers.get("Authorization"))
        return web.Response(status=status, headers={"Location": target(request.path)})

    return send


def certificates(folder, *, name="127.0.0.1"):
    """Paths of a CA's certificate, and of one that it signed for ``name`` with its key."""
    ca_key, ca = _certificate("a CA of one's own", None, None)
    key, own = _certificate(name, ca, ca_key)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    written = {"ca.pem": ca.public_bytes(pem), "own.pem": own.public_bytes(pem), "own.key": private}
    for file, data in written.items():
        (folder / file).write_bytes(data)
    return tuple(folder / file for file in written)


def shows(certificate, key):
    """The SSL context of a server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def _certificate(name, ca, ca_key):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(ca.subject if ca else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=None), critical=True)
    )
    if ca is not None:
        try:
            other = x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            other = x509.DNSName(name)
        made = made.add_extension(x509.SubjectAlternativeName([other]), critical=False)
    return key, made.sign(ca_key or key, hashes.SHA256())


@contextmanager
def answering(*chunks):
    """The URL of a server that sends these bytes to everybody and closes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(5.0)

        def serve():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    for chunk in chunks:
                        connection.sendall(chunk)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(5.0)
