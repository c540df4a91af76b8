// Pause, resume and snapshots with the unmodified E2B JavaScript SDK. Run: node --test suite_pause.mjs, with the E2B_*
// variables set.
import assert from 'node:assert/strict'
import http from 'node:http'
import { test } from 'node:test'
import { Sandbox } from 'e2b'

// One GET of http://<host>/ through the ingress, whatever this machine's resolver knows.
function visit(host) {
  const ingress = new URL(process.env.E2B_SANDBOX_URL)
  return new Promise((resolve, reject) => {
    const options = { host: ingress.hostname, port: ingress.port, path: '/', headers: { Host: host }, agent: false }
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

async function server(box) {
  await box.files.write('/home/user/index.html', 'served')
  await box.commands.run('python3 -m http.server 8000', { background: true })
  const host = box.getHost(8000)
  await eventually(async () => (await visit(host)).status === 200)
  return host
}

test('a pause keeps processes, and a server is reachable again', async () => {
  const box = await Sandbox.create({ timeoutMs: 60_000 })
  try {
    const host = await server(box)
    assert.equal(await box.pause(), true)
    assert.equal(await box.pause(), false)
    assert.equal(await box.isRunning(), false)
    const gone = await visit(host)
    assert.equal(gone.status, 502)
    assert.deepEqual(JSON.parse(gone.body), {
      sandboxId: box.sandboxId, message: 'The sandbox was not found', code: 502,
    })
    const again = await Sandbox.connect(box.sandboxId)
    assert.equal(again.sandboxId, box.sandboxId)
    assert.equal(await again.isRunning(), true)
    assert.equal((await visit(host)).body, 'served')
  } finally {
    await box.kill()
  }
})

test('the first request resumes one that paused by itself', async () => {
  const box = await Sandbox.create({ timeoutMs: 4_000, lifecycle: { onTimeout: 'pause', autoResume: true } })
  try {
    const host = await server(box)
    await eventually(async () => (await box.getInfo()).state === 'paused')
    // One that is just being paused is called paused, and may still answer: then the next request resumes it.
    await eventually(async () => (await visit(host)).body === 'served' && (await box.getInfo()).state === 'running')
  } finally {
    await box.kill()
  }
})

test('a pause of the files alone keeps them and boots anew', async () => {
  const box = await Sandbox.create({ timeoutMs: 60_000 })
  try {
    const bootId = async () => (await box.commands.run('cat /proc/sys/kernel/random/boot_id')).stdout
    const before = await bootId()
    await box.files.write('mark', 'kept')
    assert.equal(await box.pause({ keepMemory: false }), true)
    await box.connect()
    assert.equal(await box.files.read('mark'), 'kept')
    assert.notEqual(await bootId(), before)
  } finally {
    await box.kill()
  }
})

test('snapshots are copies', async () => {
  const box = await Sandbox.create({ timeoutMs: 60_000 })
  try {
    await box.files.write('mark', 'first')
    const snapshot = await box.createSnapshot()
    await box.files.write('mark', 'second')
    const copy = await Sandbox.create(snapshot.snapshotId, { timeoutMs: 60_000 })
    assert.equal(await copy.files.read('mark'), 'first')
    await copy.kill()
    assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), true)
    assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), false)
  } finally {
    await box.kill()
  }
})
