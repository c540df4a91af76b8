// What the unmodified E2B JavaScript SDK must be able to do. Run: node --test suite.mjs, with the E2B_* variables set.
import assert from 'node:assert/strict'
import http from 'node:http'
import { after, before, test } from 'node:test'
import { Sandbox, NotFoundError, CommandExitError } from 'e2b'

let box
before(async () => { box = await Sandbox.create({ timeoutMs: 300_000 }) })
after(async () => { await box?.kill() })

// One GET of http://<host><path> through the ingress, whatever this machine's resolver knows.
function visit(host, path = '/', headers = {}) {
  const ingress = new URL(process.env.E2B_SANDBOX_URL)
  return new Promise((resolve, reject) => {
    const options = { host: ingress.hostname, port: ingress.port, path, headers: { Host: host, ...headers }, agent: false }
    http.get(options, (reply) => {
      const parts = []
      reply.on('data', (part) => parts.push(part))
      reply.on('end', () => resolve({ status: reply.statusCode, body: Buffer.concat(parts).toString() }))
    }).on('error', reject)
  })
}

async function eventually(check, withinMs = 10_000) {
  for (const until = Date.now() + withinMs; ;) {
    const found = await check()
    if (found) return found
    assert.ok(Date.now() < until, 'it did not happen in time')
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
}

test('create, connect and kill', async () => {
  const made = await Sandbox.create({ timeoutMs: 30_000, metadata: { of: 'js' }, envs: { GREETING: 'hi' } })
  assert.equal(await made.isRunning(), true)
  const again = await Sandbox.connect(made.sandboxId)
  assert.equal((await again.commands.run('echo $GREETING')).stdout, 'hi\n')
  assert.equal(await made.kill(), true)
  assert.equal(await made.isRunning(), false)
  assert.equal(await Sandbox.kill(made.sandboxId), false)
})

test('list filters by metadata', async () => {
  const mark = `m${process.hrtime.bigint()}`
  const made = await Sandbox.create({ timeoutMs: 30_000, metadata: { mark } })
  const page = await Sandbox.list({ query: { metadata: { mark } } }).nextItems()
  assert.deepEqual(page.map((item) => item.sandboxId), [made.sandboxId])
  await made.kill()
})

test('a timeout ends it', async () => {
  const made = await Sandbox.create({ timeoutMs: 30_000 })
  await made.setTimeout(1_000)
  await new Promise((resolve) => setTimeout(resolve, 2_000))
  assert.equal(await made.isRunning(), false)
})

test('commands stream, fail, are listed and killed', async () => {
  const heard = []
  const ran = await box.commands.run('echo one; echo two >&2', { onStdout: (text) => heard.push(text) })
  assert.deepEqual([ran.stdout, ran.stderr, ran.exitCode, heard.join('')], ['one\n', 'two\n', 0, 'one\n'])
  await assert.rejects(box.commands.run('exit 3'), (error) => error instanceof CommandExitError && error.exitCode === 3)
  const handle = await box.commands.run('sleep 1000', { background: true })
  assert.ok((await box.commands.list()).some((process) => process.pid === handle.pid))
  assert.equal(await box.commands.kill(handle.pid), true)
  await assert.rejects(box.commands.run(`kill -0 ${handle.pid}`))
})

test('standard input', async () => {
  const heard = []
  const handle = await box.commands.run('cat', { background: true, stdin: true, onStdout: (text) => heard.push(text) })
  await box.commands.sendStdin(handle.pid, 'typed\n')
  await eventually(() => heard.join('') === 'typed\n')
  await handle.kill()
})

test('a terminal', async () => {
  const screen = []
  const terminal = await box.pty.create({ cols: 80, rows: 24, onData: (part) => screen.push(Buffer.from(part)) })
  await box.pty.resize(terminal.pid, { cols: 100, rows: 24 })
  await box.pty.sendInput(terminal.pid, new TextEncoder().encode('tput cols; exit\n'))
  assert.equal((await terminal.wait()).exitCode, 0)
  assert.match(Buffer.concat(screen).toString(), /100/)
})

test('files', async () => {
  await box.files.write('js/file.txt', 'text ✓')
  assert.equal(await box.files.read('js/file.txt'), 'text ✓')
  assert.equal(await box.files.makeDir('js/dir'), true)
  assert.equal(await box.files.makeDir('js/dir'), false)
  assert.deepEqual((await box.files.list('js')).map((entry) => entry.name).sort(), ['dir', 'file.txt'])
  await box.files.remove('js')
  assert.equal(await box.files.exists('js'), false)
  await assert.rejects(box.files.read('js/none'), NotFoundError)
})

test('a watcher streams events', async () => {
  await box.files.makeDir('js-watched')
  const names = []
  const watcher = await box.files.watchDir('js-watched', (event) => names.push(event.name))
  await box.files.write('js-watched/new', '1')
  await eventually(() => names.includes('new'))
  await watcher.stop()
})

test('signed addresses', async () => {
  await box.files.write('js-signed', 'by signature')
  const reply = await fetch(await box.downloadUrl('js-signed'))
  assert.equal(await reply.text(), 'by signature')
})

test('a web server by its host name, and a closed port', async () => {
  const handle = await box.commands.run('python3 -m http.server 8088', { background: true })
  const seen = await eventually(async () => {
    const reply = await visit(box.getHost(8088))
    return reply.status === 200 && reply
  })
  assert.equal(seen.status, 200)
  await handle.kill()
  const closed = await visit(box.getHost(3000), '/', { Accept: 'application/json' })
  assert.equal(closed.status, 502)
  assert.deepEqual(JSON.parse(closed.body), {
    sandboxId: box.sandboxId, message: 'The sandbox is running but port is not open', port: 3000, code: 502,
  })
})

test('metrics', async () => {
  const metrics = await eventually(async () => {
    const found = await box.getMetrics()
    return found.length > 0 && found
  }, 15_000)
  assert.ok(metrics[0].memTotal > 0)
})
