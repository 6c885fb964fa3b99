"""Pages that try to escape, to hang the browser or to spoil the next page.

PORT is a server on this machine, FILE a file on it.
"""

PLAY = '<script src="https://cdn.tailwindcss.com"></script>'
# normally such a script does not run; the tests let it run, to test the inner layers
CONFIG = ("<html>" + PLAY
          + "<script>tailwind.config = (() => {{ {} }})()</script><body>x</body></html>")

TCP = "http://127.0.0.1:PORT/"
ESCAPES = {
    "picture":
        f'<html><body><img src="{TCP}"><img src="http://localhost:PORT/a.png"></body></html>',
    "style sheet":
        f'<html><link rel="stylesheet" href="{TCP}a.css"><style>@import url("{TCP}b.css");'
        f'@font-face {{ font-family: a; src: url("{TCP}f") }} body {{ font-family: a; background: '
        f'url({TCP}) }}</style><body>x</body></html>',
    "preconnect":
        f'<html><head><link rel="preconnect" href="{TCP}"><link rel="dns-prefetch" '
        f'href="//127.0.0.1:PORT"><link rel="prefetch" href="{TCP}"><link rel="modulepreload" '
        f'href="{TCP}"><link rel="icon" href="{TCP}i.ico"><link rel="manifest" href="{TCP}m">'
        f'</head><body>x</body></html>',
    "refresh":
        f'<html><head><meta http-equiv="refresh" content="0; url={TCP}"></head><body>still '
        f'here</body></html>',
    "frames":
        f'<html><body><iframe src="{TCP}"></iframe><object data="{TCP}"></object>'
        f'<embed src="{TCP}"><iframe srcdoc="<img src={TCP}>"></iframe><portal src="{TCP}">'
        f'</portal></body></html>',
    "frameset":
        f'<html><frameset cols="50%,50%"><frame src="{TCP}"><frame src="file://FILE"></frameset>'
        f'</html>',
    "form":
        f'<html><body><form action="{TCP}" method="post"><input autofocus name="a" value="1">'
        f'<button>go</button></form></body></html>',
    "media":
        f'<html><body><video autoplay src="{TCP}"></video><audio autoplay src="{TCP}"></audio>'
        f'<track src="{TCP}"><svg><image href="{TCP}"/><use href="{TCP}#a"/></svg></body></html>',
    "local files":
        '<html><link rel="stylesheet" href="file://FILE"><body><img src="file://FILE"><iframe '
        'src="file:///etc/passwd"></iframe><object data="file://FILE"></object></body></html>',
    "base":
        f'<html><head><base href="{TCP}"></head><body><img src="a.png"><a ping="{TCP}" '
        f'href="b">b</a></body></html>',
    "script":
        f'<html><body><script>fetch("{TCP}"); new Image().src = "{TCP}"; new '
        f'WebSocket("ws://127.0.0.1:PORT");navigator.sendBeacon("{TCP}"); location = '
        f'"{TCP}"</script><img src=x onerror="fetch(\'{TCP}\')"></body></html>',
    "script beside Tailwind's":
        f'<html>{PLAY}<body><script>fetch("{TCP}"); document.title = "ran"</script><img src=x '
        f'onerror="document.body.innerHTML = 1; fetch(\'{TCP}\')"></body></html>',
    "requests of a script that runs": CONFIG.format(
        f'fetch("{TCP}").catch(() => 0); new Image().src = "{TCP}"; try {{ new '
        f'WebSocket("ws://127.0.0.1:PORT") }} catch {{}} try {{ navigator.sendBeacon("{TCP}") }} '
        f'catch {{}} try {{ window.open("{TCP}") }} catch {{}} try {{ location = "{TCP}" }} catch '
        f'{{}}'),
    "WebRTC": CONFIG.format(
        'const c = new RTCPeerConnection({iceServers: [{urls: "stun:127.0.0.1:PORT"}, {urls: '
        '"turn:127.0.0.1:PORT?transport=tcp", username: "a", credential: "b"}]}); '
        'c.createDataChannel("x"); c.createOffer().then(o => c.setLocalDescription(o))'),
    "worker": CONFIG.format(
        f'try {{ new Worker(URL.createObjectURL(new Blob(["fetch(\'{TCP}\')"]))) }} catch {{}} '
        f'try {{ navigator.serviceWorker.register("{TCP}sw.js") }} catch {{}}'),
    "download":
        f'<html><body><a id="a" download href="data:application/octet-stream,x">x</a>{PLAY}<script>'
        'tailwind.config = (() => { document.getElementById("a").click() })()</script></body>'
        '</html>',
}
BURDENS = {
    "dialogs": CONFIG.format(
        "for (let i = 0; i < 1e6; i++) { alert(i); confirm(i); prompt(i) }; print()"),
    "a giant page":
        '<html><body style="margin:0"><div style="width:60000px;height:100000px;background:red">'
        '</div></body></html>',
    "giant pictures":
        "<html><body>" + '<img src="https://picsum.photos/100000/100000">' * 20 + "</body></html>",
    "a giant canvas":
        '<html><body><svg width="99999" height="99999"><filter id="f"><feTurbulence '
        'baseFrequency="1" numOctaves="20"/></filter><rect width="9999" height="9999" '
        'filter="url(#f)"/></svg></body></html>',
    "deep nesting": "<html><body>" + "<div>" * 20000 + "x</body></html>",
    "misnesting": "<html><body>" + "<b><p><i>" * 4000 + "x</body></html>",
    "many elements": "<html><body>" + "<p>x" * 100000 + "</body></html>",
    "endless animation":
        '<html><style>@keyframes a { to { transform: rotate(360deg); background: red } } div { '
        'animation: a 0.1s infinite; width: 50px; height: 50px }</style><body><div></div>'
        '<marquee>x</marquee></body></html>',
    "odd characters":
        "<html><body>\ud800 \x00 \u202e \ufeff 🙂 &#xD800; <!-- <![CDATA[ </body></html>",
    "no page at all": "<html>" + "\x00\x01\xff" * 1000 + "</html>",
    "cookies and history":
        '<html><head><meta http-equiv="set-cookie" content="a=b">'
        '<meta http-equiv="Content-Security-Policy" content="default-src *"></head><body>'
        '<a href="">x</a></body></html>',
    "zoom":
        '<html><head><meta name="viewport" content="width=10, initial-scale=9"></head>'
        '<body style="zoom: 50">x</body></html>',
}
_LAUGHS = "".join(f'<g id="a{i}">' + f'<use href="#a{i - 1}"/>' * 10 + "</g>" for i in range(1, 10))
HANGS = {  # these exceed the deadline or the memory limit
    "billion laughs":
        f'<html><body><svg><defs><g id="a0"><text>lol</text></g>{_LAUGHS}</defs><use href="#a9"/>'
        f'</svg></body></html>',
    "an endless pattern":
        "<html>" + PLAY + r"<script>tailwind.config = {safelist: [{pattern: /^(\w+-?)+!$/}]}"
        "</script><body>x</body></html>",
    "a memory bomb":
        '<html><script src="https://unpkg.com/@tailwindcss/browser@4"></script>'
        '<style type="text/tailwindcss">@import "tailwindcss"; @source inline("p-{0..999999999}");'
        '</style>' "<body>x</body></html>",
    "an endless script": CONFIG.format("for (;;) {}"),
}
SLOW = {"dialogs", "a giant canvas", "misnesting", "many elements",
        "requests of a script that runs", "an endless pattern", "an endless script"}
